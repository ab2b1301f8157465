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
    """A member's choice, by what the newest snapshots have cost it. Every step until some have been measured."""

    def __init__(self) -> None:
        self._costs: deque[float] = deque(maxlen=MEASURED)
        self._steps: deque[float] = deque(maxlen=MEASURED)

    def observe(self, cost_s: float, step_s: float) -> None:
        """A snapshot has cost this much, in a step of this length."""
        self._costs.append(cost_s)
        self._steps.append(step_s)

    @property
    def interval(self) -> int:
        """Steps between two snapshots."""
        if len(self._costs) < MEASURED:
            return 1
        return interval_for(median(self._costs), median(self._steps))
