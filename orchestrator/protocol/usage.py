"""Resource usage of workers: traffic between them by kind, per step, and energy."""

from dataclasses import astuple, dataclass
from enum import StrEnum


class TrafficKind(StrEnum):
    """Purpose of bytes between workers."""

    GRADIENT = "gradient"  # pieces of gradients, sent to the rank that updates the parameters
    PARAMETER = "parameter"  # updated weights, gathered
    DISPATCH = "dispatch"  # tokens to their experts, and the gradients that return on this path
    COMBINE = "combine"  # experts' results, and their gradients
    PROTECTION = "protection"  # snapshots to a buddy
    TRANSFER = "transfer"  # state in a rescale or recovery
    CONTROL = "control"  # votes, expert counts, norms


@dataclass(frozen=True)
class Traffic:
    """Bytes that a worker sends to other workers.

    Args:
        raw: size without compression.
        payload: values, including scales.
        index: positions of values, if only some of them are sent.
        across: bytes of tokens and results to another node; 0 for other kinds, or if the nodes are unknown.
    """

    raw: int = 0
    payload: int = 0
    index: int = 0
    across: int = 0

    @property
    def sent(self) -> int:
        return self.payload + self.index

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(mine - others for mine, others in zip(astuple(self), astuple(other), strict=True)))


# -- Energy of a worker, from the counters of its machine --------------------------------------------------------------


@dataclass(frozen=True)
class EnergyReading:
    """Joules since the start of the worker's process. None, unlike 0: no such counter could be read.

    Args:
        gpu_j: energy of its GPUs (NVML).
        cpu_j: its share of the energy of its node's processors and memory (RAPL).
    """

    gpu_j: float | None = None
    cpu_j: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.gpu_j is not None or self.cpu_j is not None
