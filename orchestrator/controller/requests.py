"""What others ask of a run, or report to it: requests, from the call until the controller has journalled them, and
nodes that are being drained."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.cluster.inbox import Inbox, wake
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.errors import NotFinished, UsageError
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.protocol.scaling import Grant
from orchestrator.run_records.journaled_run import JournaledRun

PATIENCE_S = 1.5  # of a call while storage doesn't answer: it should be answered within 2 s
BEGIN = "begin"  # the storage task without which no decision is made
BUSY_S = 15.0  # of a call to a controller whose node is busy


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

    def __init__(
        self, run_id: str, memory: JournaledRun, writer: JournalWriter, storage: StorageThread, inbox: Inbox
    ) -> None:
        self._run_id, self._memory, self._inbox = run_id, memory, inbox
        self._writer, self._storage = writer, storage
        self._turned = threading.Condition()
        self.newest = memory.state.target
        self.grant = memory.state.queue.grant
        self.priority = memory.state.priority
        self.draining: Mapping[str, float] = {}

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
            NotFinished: it is accepted, and could not be journalled in time.
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
            self._await(lambda: self._memory.state.target.seq >= target.seq)
        return target

    def prioritise(self, priority: int) -> int:
        """Request this priority. Returns it when it is journalled.

        Raises:
            UsageError: the run is ending.
            NotFinished: it is accepted, and could not be journalled in time.
        """
        with self._turned:
            self._refuse_ending(FinishMode.NO)
            self.priority = priority
            self._await(lambda: self._memory.state.priority == self.priority)
        return priority

    def granted(self, grant: Grant) -> None:
        """Accept the Scheduler's grant of workers. Returns when it is journalled.

        Raises:
            NotFinished: it is accepted, and could not be journalled in time.
        """
        with self._turned:
            self.grant = grant
            self._await(lambda: self._memory.state.queue.grant == self.grant)

    def drained(self, nodes: Mapping[str, float]) -> None:
        """Note nodes that are being drained, with deadlines in `time.time()` seconds, 0 without one. They stay noted
        once they are gone: a drain can't be undone."""
        with self._turned:
            known = {**self.draining, **nodes}
            is_new, self.draining = known != self.draining, known
        if is_new:
            wake(self._inbox)

    def _await(self, is_journalled: Callable[[], bool]) -> None:
        """Let the controller decide, and wait until it has. Raises NotFinished."""
        wake(self._inbox)
        deadline_s = time.monotonic() + BUSY_S
        while not self._turned.wait_for(is_journalled, PATIENCE_S):
            self._refuse_ending(self.newest.finish)  # it has ended meanwhile
            no_turns = self._storage.is_pending(BEGIN)
            if no_turns or self._writer.unrecorded_s >= PATIENCE_S / 2 or time.monotonic() > deadline_s:
                trouble = self._memory.trouble or self._writer.trouble() or self._storage.trouble()
                why = trouble.why if trouble is not None else "its controller is busy"
                raise NotFinished(
                    f"run {self._run_id} has accepted the request, and has not recorded it yet: {why}",
                    remedy="It takes effect once it is recorded. Repeat it if the controller is restarted before that.",
                )

    def _refuse_ending(self, finish: FinishMode) -> None:
        is_other = self.newest.finish not in (FinishMode.NO, finish) and finish is not FinishMode.STOP_NOW
        if self._memory.state.outcome is not None or is_other:
            raise UsageError(f"run {self._run_id} is ending", unchanged="Nothing was changed.")

    def turned(self) -> None:
        """Wake the callers after a turn: earlier requests are journalled, unless writing failed."""
        with self._turned:
            self._turned.notify_all()
