"""`compression: auto` on one rank: what the first steps of a generation show, and what it would have for the rest.

The first steps send gradients as they are and after the backward pass: so it is seen what the link takes, and what a
pass takes. Then each rank says in its vote what it would have, and all use the coarsest that any of them named. A new
generation begins anew: another world has other links.
"""

import time

import torch

from orchestrator.comm.gradients.codecs import codec_of
from orchestrator.engine.gradients import Gradients
from orchestrator.policy.estimate.compression_choice import CANDIDATES, Measured, choose
from orchestrator.spec.communication import BLOCK, CompressionSpec

SKIPPED, PROBES = 1, 3  # steps; the first of a generation is slow for other reasons
SAMPLE = 1 << 18  # elements that coding is timed on

_coding_s: dict[str, float] = {}  # per element, of this process


class CompressionTuner:
    """For the life of a shard. By the training thread.

    Args:
        gradients: whose way is chosen.
        compression: of the job; anything but `auto` is left alone.
        overlap: what the job says, once it is chosen.
        world_size: of the generation; a rank alone has nothing to choose.
    """

    def __init__(self, gradients: Gradients, compression: CompressionSpec, overlap: bool, world_size: int) -> None:
        self._gradients, self._overlap = gradients, overlap
        self._is_open = compression.scheme == "auto" and world_size > 1
        self._steps = 0
        self._fastest_s = self._backward_s = self._step_s = float("inf")
        self._bytes = 0
        self.scheme: str = "none" if compression.scheme == "auto" else compression.scheme
        if self._is_open:
            self._gradients.use("none", overlap=False)

    @property
    def proposal(self) -> int:
        """Number of the scheme that this rank would have; -1 while it doesn't know, or needn't."""
        if not self._is_open or self._steps < SKIPPED + PROBES:
            return -1
        measured = Measured(
            step_s=self._step_s,
            backward_s=self._backward_s,
            num_buckets=self._gradients.num_buckets,
            gradient_bytes=self._bytes,
            bytes_per_s=self._bytes / max(self._fastest_s, 1e-9),
            coding_s={name: coding_s(name) * self._gradients.num_compressed for name in CANDIDATES[1:]},
        )
        return CANDIDATES.index(choose(measured))

    def observe(self, step_s: float, gradient_bytes: int) -> None:
        """Called before the vote of each step.

        Args:
            step_s: its duration so far, waits for peers apart.
            gradient_bytes: that this rank has sent in it.
        """
        self._steps += 1
        if not self._is_open or self._steps <= SKIPPED:
            return
        self._fastest_s = min(self._fastest_s, self._gradients.after_backward_s)
        self._backward_s = min(self._backward_s, self._gradients.backward_s)
        self._step_s, self._bytes = min(self._step_s, step_s), gradient_bytes

    def agree(self, number: int) -> None:
        """Called after each vote with what it has chosen; -1 for nothing yet."""
        if self._is_open and number >= 0:
            self._is_open, self.scheme = False, CANDIDATES[number]
            self._gradients.use(self.scheme, self._overlap)


def coding_s(scheme: str) -> float:
    """Seconds that encoding and decoding an element takes here."""
    if scheme not in _coding_s:
        codec = codec_of(CompressionSpec.model_validate({"scheme": scheme}), 2, 0)
        sample, total = torch.randn(1, SAMPLE), torch.zeros(SAMPLE)
        assert SAMPLE % BLOCK == 0
        spent = []
        for _ in range(3):
            began_s = time.perf_counter()
            codec.add(total, codec.take(sample.clone())[0])
            spent.append(time.perf_counter() - began_s)
        _coding_s[scheme] = min(spent) / SAMPLE
    return _coding_s[scheme]
