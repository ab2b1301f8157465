"""Average of experts' loads over the newest steps. Pure.

Shape legend: L = MoE layers, E = experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.protocol.expert_load import Loads

KEPT = 0.95  # of the average's weight, per step: its mean age is 20 steps


@dataclass(frozen=True)
class LoadAverage:
    """Exponential average of the tokens that each expert got in a step.

    Args:
        num_steps: that it is of.
    """

    sums_LE: tuple[tuple[float, ...], ...] = ()
    weight: float = 0.0
    num_steps: int = 0

    def after(self, steps: Iterable[Loads]) -> "LoadAverage":
        """The average with the loads of these steps. Those without any, or without tokens, are left out."""
        found = [np.asarray(loads, dtype=np.float64) for loads in steps if any(map(any, loads))]
        if not found:
            return self
        sums_LE, weight = np.zeros_like(found[-1]), 0.0
        if self.num_steps and np.shape(self.sums_LE) == sums_LE.shape:
            sums_LE, weight = np.asarray(self.sums_LE), self.weight
        for load_LE in found:
            if load_LE.shape != sums_LE.shape:
                continue
            sums_LE, weight = KEPT * sums_LE + load_LE, KEPT * weight + 1.0
        return LoadAverage(tuple(map(tuple, sums_LE.tolist())), weight, self.num_steps + len(found))

    @property
    def mean_LE(self) -> NDArray[np.float64]:
        """Tokens of each expert per step. Empty where no loads are known."""
        return np.asarray(self.sums_LE, dtype=np.float64) / max(self.weight, 1.0)
