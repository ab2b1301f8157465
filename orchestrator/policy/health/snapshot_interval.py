"""Snapshot interval with `protection.every: auto`: as short as its cost allows."""

import math
from collections import deque
from statistics import median

ALLOWED_COST = 0.02  # of a step's time; below the documented 3 %, as costs vary
MEASURED = 5  # snapshots that a choice is based on
MAX_INTERVAL = 64  # steps: most that a failure may cost


def interval_for(cost_s: float, step_s: float) -> int:
    """Shortest interval, in steps, that keeps the cost of snapshots within `ALLOWED_COST`.

    Args:
        cost_s: training time that one snapshot takes, seconds.
        step_s: duration of a step, seconds.
    """
    if step_s <= 0:
        return 1
    return max(1, min(MAX_INTERVAL, math.ceil(cost_s / (ALLOWED_COST * step_s))))


class IntervalChoice:
    """A member's choice by the cost of its newest snapshots. Every step until `MEASURED` of them are measured.

    The cost is taken per byte: snapshots of every step are smaller, as most of them hold only the changes of the step.

    Args:
        whole_bytes: size of a snapshot that doesn't directly follow the one before.
        mean_bytes: mean size of a snapshot if one is taken every step.
    """

    def __init__(self, whole_bytes: int, mean_bytes: float) -> None:
        self._whole_bytes, self._mean_bytes = whole_bytes, mean_bytes
        self._costs: deque[float] = deque(maxlen=MEASURED)  # of a byte, seconds
        self._steps: deque[float] = deque(maxlen=MEASURED)

    def observe(self, cost_s: float, num_bytes: int, step_s: float) -> None:
        """Record the cost of a snapshot of `num_bytes`, in a step of `step_s`."""
        self._costs.append(cost_s / max(num_bytes, 1))
        self._steps.append(step_s)

    @property
    def interval(self) -> int:
        """Steps between two snapshots."""
        if len(self._costs) < MEASURED:
            return 1
        byte_s, step_s = median(self._costs), median(self._steps)
        if interval_for(self._mean_bytes * byte_s, step_s) == 1:
            return 1
        return max(2, interval_for(self._whole_bytes * byte_s, step_s))
