"""Average of experts' loads over the newest steps. Pure.

Shape legend: L = MoE layers, E = experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.protocol.expert_load import Loads

KEPT = 0.95  # of the average's weight, per step: its mean age is 20 steps
KNOWN = 10.0  # weight from which on placements follow from it: that of 14 steps in a row, of 20 at most


@dataclass(frozen=True)
class LoadAverage:
    """Exponential average of the tokens that each expert got in a step, by the steps' age.

    Args:
        weight: of all steps that it is of: that of the newest one was 1.
        last_step: the newest one; -1 without any.
    """

    sums_LE: tuple[tuple[float, ...], ...] = ()
    weight: float = 0.0
    last_step: int = -1

    def after(self, steps: Iterable[tuple[int, Loads]]) -> "LoadAverage":
        """The average with the loads of these later steps. Those without any, or without tokens, are left out."""
        found = [(step, np.asarray(loads, dtype=np.float64)) for step, loads in steps if any(map(any, loads))]
        if not found:
            return self
        sums_LE, weight, last_step = np.zeros_like(found[-1][1]), 0.0, self.last_step
        if np.shape(self.sums_LE) == sums_LE.shape:
            sums_LE, weight = np.asarray(self.sums_LE), self.weight
        for step, load_LE in found:
            if load_LE.shape == sums_LE.shape:
                kept = KEPT ** max(step - last_step, 1)
                sums_LE, weight, last_step = kept * sums_LE + load_LE, kept * weight + 1.0, step
        return LoadAverage(tuple(map(tuple, sums_LE.tolist())), weight, last_step)

    @property
    def is_known(self) -> bool:
        """Whether it is of enough steps that followed one another, and not of the few that a journal has."""
        return self.weight >= KNOWN

    @property
    def mean_LE(self) -> NDArray[np.float64]:
        """Tokens of each expert per step. Empty where no loads are known."""
        return np.asarray(self.sums_LE, dtype=np.float64) / self.weight if self.weight else np.zeros((0, 0))
