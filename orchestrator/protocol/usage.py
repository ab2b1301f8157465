"""What workers send one another, by kind: the account that every step closes."""

from dataclasses import astuple, dataclass
from enum import StrEnum


class TrafficKind(StrEnum):
    """What bytes between workers are for."""

    GRADIENT = "gradient"  # pieces of gradients, on their way to the rank that updates with them
    PARAMETER = "parameter"  # updated weights, gathered
    DISPATCH = "dispatch"  # tokens to their experts, and the gradients that come back that way
    COMBINE = "combine"  # experts' results, and their gradients
    PROTECTION = "protection"  # snapshots to a buddy
    TRANSFER = "transfer"  # state in a rescale or recovery
    CONTROL = "control"  # votes, expert counts, norms


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave a worker for another one.

    Args:
        raw: what they would be without compression.
        payload: values, scales included.
        index: where values belong, if only some of them are sent.
        across: those of tokens and results that go to another node; 0 for other kinds, or if nobody knows the nodes.
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


# -- What a worker has used, as the counters of its machine tell -------------------------------------------------------


@dataclass(frozen=True)
class EnergyReading:
    """Joules since the worker's process began. None: no such counter could be read, which is not 0.

    Args:
        gpu_j: of its GPUs (NVML).
        cpu_j: its share of its node's processors and memory (RAPL).
    """

    gpu_j: float | None = None
    cpu_j: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.gpu_j is not None or self.cpu_j is not None
