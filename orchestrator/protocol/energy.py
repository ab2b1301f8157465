"""What a worker has used, as the counters of its machine tell."""

from dataclasses import dataclass


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
