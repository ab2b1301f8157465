"""`compression: auto` on one rank: measurements in the first steps of a generation, and a scheme for the rest.

The first steps send gradients uncompressed and after the backward pass, which measures the link and the pass
separately. Then each rank names its preferred scheme in its vote, and all use the coarsest named. A new generation
starts again: another world has other links.
"""

import torch

from orchestrator.comm.gradients.codecs import codec_of
from orchestrator.engine.device_time import finished_s
from orchestrator.engine.gradients import Gradients
from orchestrator.policy.estimate.compression_choice import CANDIDATES, Measured, choose
from orchestrator.spec.communication import BLOCK, CompressionSpec

SKIPPED, PROBES = 1, 3  # steps; the first of a generation is slow for other reasons
SAMPLE = 1 << 18  # elements used to time coding

_coding_s: dict[tuple[str, torch.device], float] = {}  # per element, of this process


class CompressionTuner:
    """Chooses the compression of one shard. Used by the training thread.

    Args:
        gradients: whose compression is chosen.
        compression: of the job; any scheme but `auto` is kept.
        overlap: the job's setting, used once a scheme is chosen.
        world_size: of the generation; a world of one has nothing to choose.
    """

    def __init__(self, gradients: Gradients, compression: CompressionSpec, overlap: bool, world_size: int) -> None:
        self._gradients, self._overlap = gradients, overlap
        self._is_open = compression.scheme == "auto" and world_size > 1
        self._steps = 0
        self._fastest_s = self._backward_s = self._step_s = float("inf")
        self._bytes = 0
        self.scheme: str = "none" if compression.scheme == "auto" else compression.scheme
        self._gradients.is_timed = self._is_open
        if self._is_open:
            self._gradients.use("none", overlap=False)

    @property
    def proposal(self) -> int:
        """Number of the scheme that this rank prefers; -1 while that is unknown, or not needed."""
        if not self._is_open or self._steps < SKIPPED + PROBES:
            return -1
        measured = Measured(
            step_s=self._step_s,
            backward_s=self._backward_s,
            num_buckets=self._gradients.num_buckets,
            gradient_bytes=self._bytes,
            bytes_per_s=self._bytes / max(self._fastest_s, 1e-9),
            coding_s={
                name: coding_s(name, self._gradients.device) * self._gradients.num_compressed for name in CANDIDATES[1:]
            },
        )
        return CANDIDATES.index(choose(measured))

    def observe(self, step_s: float, gradient_bytes: int) -> None:
        """Called before the vote of each step.

        Args:
            step_s: its duration so far, waits for peers excluded.
            gradient_bytes: sent by this rank in it.
        """
        self._steps += 1
        if not self._is_open or self._steps <= SKIPPED:
            return
        self._fastest_s = min(self._fastest_s, self._gradients.after_backward_s)
        self._backward_s = min(self._backward_s, self._gradients.backward_s)
        self._step_s, self._bytes = min(self._step_s, step_s), gradient_bytes

    def agree(self, number: int) -> None:
        """Called after each vote with the number of the chosen scheme; -1 for none yet."""
        if self._is_open and number >= 0:
            self._is_open, self.scheme = False, CANDIDATES[number]
            self._gradients.is_timed = False
            self._gradients.use(self.scheme, self._overlap)


def coding_s(scheme: str, device: torch.device) -> float:
    """Seconds to encode and decode an element in this process, on the device that trains."""
    if (scheme, device) not in _coding_s:
        codec = codec_of(CompressionSpec.model_validate({"scheme": scheme}), 2, 0)
        sample, total = torch.randn(1, SAMPLE, device=device), torch.zeros(SAMPLE, device=device)
        assert SAMPLE % BLOCK == 0
        spent = []
        for _ in range(3):
            copy = sample.clone()
            began_s = finished_s(device)
            codec.add(total, codec.take(copy)[0])
            spent.append(finished_s(device) - began_s)
        _coding_s[scheme, device] = min(spent) / SAMPLE
    return _coding_s[scheme, device]
