"""How often snapshots are taken where the job says `protection: auto`: as often as costs little."""

import math
from collections import deque
from statistics import median

ALLOWED_COST = 0.02  # of a step's time; under the 3 % that users are promised, as costs vary
MEASURED = 5  # snapshots that a choice rests on
MAX_INTERVAL = 64  # steps: what a loss may cost at most


def interval_for(cost_s: float, step_s: float) -> int:
    """Fewest steps between two snapshots that keep their cost within `ALLOWED_COST`.

    Args:
        cost_s: what one snapshot takes from training, seconds.
        step_s: how long a step takes, seconds.
    """
    if step_s <= 0:
        return 1
    return max(1, min(MAX_INTERVAL, math.ceil(cost_s / (ALLOWED_COST * step_s))))


class IntervalChoice:
    """A member's choice, by what the newest snapshots have cost it. Every step until some have been measured.

    Snapshots cost by the byte, as far as they can be told apart: those of every step are smaller, as most of them hold
    only what the step has changed.

    Args:
        whole_bytes: of a snapshot that doesn't follow the one before at once.
        mean_bytes: of a snapshot if one follows every step.
    """

    def __init__(self, whole_bytes: int, mean_bytes: float) -> None:
        self._whole_bytes, self._mean_bytes = whole_bytes, mean_bytes
        self._costs: deque[float] = deque(maxlen=MEASURED)  # of a byte, seconds
        self._steps: deque[float] = deque(maxlen=MEASURED)

    def observe(self, cost_s: float, num_bytes: int, step_s: float) -> None:
        """A snapshot of so many bytes has cost this much, in a step of this length."""
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
