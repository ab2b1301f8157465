"""The steps after which all members write a checkpoint: by number, by time, or on request."""

import time
from collections.abc import Callable

from orchestrator.spec.fault_tolerance import AUTO


class CheckpointTimer:
    """Clocks of members differ, so with `every: auto` each votes by its own, and all follow the first one that is due.

    Args:
        every: value of the job's `checkpoint.every` key.
        max_steps: of the run; after its last step a checkpoint is written anyway.
        at_least_every: the most steps between two checkpoints with `every: auto`; None: no limit.
    """

    def __init__(
        self,
        every: int | str,
        max_steps: int,
        clock: Callable[[], float] = time.monotonic,
        at_least_every: int | None = None,
    ) -> None:
        self._every, self._max_steps, self._clock = every, max_steps, clock
        self._by_number = every if isinstance(every, int) else at_least_every if every == AUTO else None
        self._since_s: float | None = None  # the newest checkpoint, or the first step here
        self._step = -1  # the newest one that ended here
        self._saved = -1  # the step of the newest checkpoint that was begun here

    def begin(self, step: int) -> None:
        """Start the clock, unless it runs. It restarts for a worker that was no member when `step` ended."""
        if self._since_s is None or step > self._step:
            self._since_s = self._clock()
        self._saved = -1  # what the generation before has begun may not be completed

    def restart(self) -> None:
        """Restart the clock: a checkpoint is being written."""
        self._since_s, self._saved = self._clock(), self._step

    def wants(self, step: int, interval_s: float, requested_from: int = -1) -> bool:
        """This member's vote for a checkpoint after the step.

        Args:
            interval_s: training time between two checkpoints with `every: auto`.
            requested_from: a checkpoint of this step or a later one is requested, and not complete yet; -1: none.
        """
        if self._saved < requested_from <= step:
            return True
        return self._every == AUTO and self._since_s is not None and self._clock() - self._since_s >= interval_s

    def due(self, step: int, agreed: bool) -> bool:
        """Whether a checkpoint follows `step`. The same on all members.

        Args:
            agreed: result of the vote: any member wants one.
        """
        self._step, done = step, step + 1
        by_number = self._by_number is not None and done % self._by_number == 0
        return done < self._max_steps and (agreed or by_number)
