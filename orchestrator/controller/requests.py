"""Requests to a run, from the call until the run's controller has journalled them."""

import threading
from collections.abc import Sequence

from orchestrator.cluster.inbox import Inbox
from orchestrator.errors import NotFinished, UsageError
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.protocol.scaling import Grant
from orchestrator.run_records.run_history import JournaledRun

PATIENCE_S = 10.0
LATER = "Check its status and try again in a moment."


def member_of_rank(run_id: str, members: Sequence[str], rank: int | None) -> str:
    """The member with this rank; None for the highest. Raises UsageError if no member has it now."""
    if not members or not -1 <= (-1 if rank is None else rank) < len(members):
        raise UsageError(
            f"rank {rank if rank is not None else 'any'} asked for; {run_id} has {len(members)} members now",
            remedy="Name a rank from 0 to one less than that.",
            unchanged="No worker was killed.",
        )
    return members[-1 if rank is None else rank]


class PendingRequests:
    """Newest requests of any thread, which wait until a turn of the controller has journalled them."""

    def __init__(self, run_id: str, memory: JournaledRun, inbox: Inbox) -> None:
        self._run_id, self._memory, self._inbox = run_id, memory, inbox
        self._turned = threading.Condition()
        self.newest = memory.state.target
        self.grant = memory.state.queue.grant
        self.priority = memory.state.priority

    def aim(
        self,
        finish: FinishMode,
        reason: str,
        workers: int | None = None,
        stage: str | None = None,
        by_hand: bool | None = None,
    ) -> DesiredRunState:
        """Request this state; None keeps the previous value of `workers`, `stage` or `by_hand`. Returns when it is
        journalled. A size that was not requested by hand yields at once to one that was.

        Raises:
            UsageError: the run is ending, or is to end in another way.
            NotFinished: it was not journalled in time.
        """
        with self._turned:
            self._refuse_ending(finish)
            if by_hand is False and workers is not None and self.newest.by_hand:
                return self.newest
            size = self.newest.workers if workers is None else workers
            requests = self.newest.stage_requests + (stage is not None)
            name = self.newest.stage if stage is None else stage
            by_hand = self.newest.by_hand if by_hand is None else by_hand
            target = self.newest = DesiredRunState(self.newest.seq + 1, size, finish, reason, name, requests, by_hand)
            self._inbox.put(None)
            if not self._turned.wait_for(lambda: self._memory.state.target.seq >= target.seq, PATIENCE_S):
                why = self._memory.trouble or "it is busy"
                raise NotFinished(f"run {self._run_id} has not journalled the request yet: {why}", remedy=LATER)
            return target

    def prioritise(self, priority: int) -> int:
        """Request this priority. Returns it when it is journalled.

        Raises:
            UsageError: the run is ending.
            NotFinished: it was not journalled in time.
        """
        with self._turned:
            self._refuse_ending(FinishMode.NO)
            self.priority = priority
            self._inbox.put(None)
            if not self._turned.wait_for(lambda: self._memory.state.priority == self.priority, PATIENCE_S):
                raise NotFinished(f"run {self._run_id} has not journalled its priority yet", remedy=LATER)
            return priority

    def granted(self, grant: Grant) -> None:
        """Accept the Scheduler's grant of workers. Returns when it is journalled.

        Raises:
            NotFinished: it was not journalled in time.
        """
        with self._turned:
            self.grant = grant
            self._inbox.put(None)
            if not self._turned.wait_for(lambda: self._memory.state.queue.grant == self.grant, PATIENCE_S):
                raise NotFinished(f"run {self._run_id} has not journalled its grant yet", remedy=LATER)

    def _refuse_ending(self, finish: FinishMode) -> None:
        is_other = self.newest.finish not in (FinishMode.NO, finish) and finish is not FinishMode.STOP_NOW
        if self._memory.state.outcome is not None or is_other:
            raise UsageError(f"run {self._run_id} is ending", unchanged="Nothing was changed.")

    def turned(self) -> None:
        """Wake the callers after a turn: earlier requests are journalled, unless writing failed."""
        with self._turned:
            self._turned.notify_all()
