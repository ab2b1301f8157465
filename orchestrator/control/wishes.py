"""What others want of a run, from the call that says so until the run's controller has written it down."""

import threading

from orchestrator.control.crew import Inbox
from orchestrator.control.memory import RunMemory
from orchestrator.errors import NotFinished, UsageError
from orchestrator.protocol.messages import Finish, Target

PATIENCE_S = 10.0
LATER = "Look at its status, and try again in a moment."


class Wishes:
    """Wishes come from any thread; the controller's turns take in the newest, and say so."""

    def __init__(self, run_id: str, memory: RunMemory, inbox: Inbox) -> None:
        self._run_id, self._memory, self._inbox = run_id, memory, inbox
        self._turned = threading.Condition()
        self.newest = memory.state.target

    def aim(self, finish: Finish, reason: str, workers: int | None = None, stage: str | None = None) -> Target:
        """Want this; `workers` is None for as many as before, `stage` for no other one. Returns when it is written
        down.

        Raises:
            UsageError: the run is ending, or is to end in another way.
            NotFinished: it was not written down in time.
        """
        with self._turned:
            if self._memory.state.outcome is not None or self.newest.finish not in (Finish.NO, finish):
                raise UsageError(f"run {self._run_id} is ending", unchanged="Nothing was changed.")
            size = self.newest.workers if workers is None else workers
            wishes = self.newest.stage_wishes + (stage is not None)
            name = self.newest.stage if stage is None else stage
            target = self.newest = Target(self.newest.seq + 1, size, finish, reason, name, wishes)
            self._inbox.put(None)
            if not self._turned.wait_for(lambda: self._memory.state.target.seq >= target.seq, PATIENCE_S):
                why = self._memory.trouble or "it is busy"
                raise NotFinished(f"run {self._run_id} has not written the wish down yet: {why}", remedy=LATER)
            return target

    def turned(self) -> None:
        """A turn has ended: what was wanted before it is written down, if it could be."""
        with self._turned:
            self._turned.notify_all()
