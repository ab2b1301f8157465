"""Calls from outside to a run's controller: requests, each until it is journalled, and nodes that are being drained."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from orchestrator.cluster.inbox import Inbox, wake
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.errors import NotFinished, UsageError
from orchestrator.protocol.messages import DesiredRunState, ExpertRequest, FinishMode
from orchestrator.protocol.scaling import Grant
from orchestrator.run_records.journaled_run import JournaledRun

log = logging.getLogger("orchestrator.control")

PATIENCE_S = 1.5  # of a call while storage doesn't answer: it should be answered within 2 s
BEGIN = "begin"  # the storage task without which no decision is made
BUSY_S = 15.0  # of a call to a controller whose node is busy

R = TypeVar("R")


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
    """Newest requests of any thread, which wait until a turn of the controller has journalled them.

    Before `open` no request can be compared with the run's state: one that has waited for `PATIENCE_S` is accepted, and
    takes effect with `open`.
    """

    newest: DesiredRunState
    grant: Grant
    priority: int | None

    def __init__(self, run_id: str, inbox: Inbox) -> None:
        self._run_id, self._inbox = run_id, inbox
        self._turned = threading.Condition()
        self._is_open, self._began_s = False, time.monotonic()
        self._early: list[Callable[[], object]] = []  # changes that were accepted before `open`, oldest first
        self.draining: Mapping[str, float] = {}

    def open(self, memory: JournaledRun, writer: JournalWriter, storage: StorageThread) -> None:
        """Let requests be journalled from now on, those first that were accepted earlier."""
        with self._turned:
            self._memory, self._writer, self._storage = memory, writer, storage
            self.newest, self.grant = memory.state.target, memory.state.queue.grant
            self.priority = memory.state.priority
            for change in self._early:
                try:
                    change()
                except UsageError as error:
                    log.warning("a request made while the controller opened the run has no effect: %s", error)
            self._early, self._is_open = [], True
            self._turned.notify_all()

    def aim(
        self,
        finish: FinishMode,
        reason: str,
        workers: int | None = None,
        stage: str | None = None,
        by_hand: bool | None = None,
        checkpoint: int | None = None,
        rebalance: bool = False,
        experts: ExpertRequest | None = None,
    ) -> DesiredRunState:
        """Request this state; None keeps the previous value. Returns when it is journalled. A size that was not
        requested by hand is replaced at once by one that was. Other arguments as in `DesiredRunState`.

        Raises:
            UsageError: the run is ending, or is to end in another way.
            NotFinished: it is accepted, and could not be journalled in time.
        """
        began_s = time.monotonic()
        with self._turned:
            target = self._change(
                partial(self._aim, finish, reason, workers, stage, by_hand, checkpoint, rebalance, experts)
            )
            is_yielding = by_hand is False and workers is not None and target.by_hand
            if not is_yielding:
                self._await(lambda: self._memory.state.target.seq >= target.seq, began_s)
        return target

    def _aim(
        self,
        finish: FinishMode,
        reason: str,
        workers: int | None,
        stage: str | None,
        by_hand: bool | None,
        checkpoint: int | None,
        rebalance: bool,
        experts: ExpertRequest | None,
    ) -> DesiredRunState:
        self._refuse_ending(finish)
        if by_hand is False and workers is not None and self.newest.by_hand:
            return self.newest
        if checkpoint is not None and checkpoint <= self.newest.checkpoint:  # it is requested, and names no size
            return self.newest
        newest = self.newest
        self.newest = DesiredRunState(
            seq=newest.seq + 1,
            workers=newest.workers if workers is None else workers,
            finish=finish,
            reason=reason,
            stage=newest.stage if stage is None else stage,
            stage_requests=newest.stage_requests + (stage is not None),
            by_hand=newest.by_hand if by_hand is None else by_hand,
            checkpoint=newest.checkpoint if checkpoint is None else checkpoint,
            rebalances=newest.rebalances + rebalance,
            experts=newest.experts if experts is None else replace(experts, number=newest.experts.number + 1),
        )
        return self.newest

    def prioritise(self, priority: int) -> int:
        """Request this priority. Returns it when it is journalled.

        Raises:
            UsageError: the run is ending.
            NotFinished: it is accepted, and could not be journalled in time.
        """
        began_s = time.monotonic()
        with self._turned:
            self._change(partial(self._prioritise, priority))
            self._await(lambda: self._memory.state.priority == self.priority, began_s)
        return priority

    def _prioritise(self, priority: int) -> None:
        self._refuse_ending(FinishMode.NO)
        self.priority = priority

    def granted(self, grant: Grant) -> None:
        """Accept the Scheduler's grant of workers. Returns when it is journalled.

        Raises:
            NotFinished: it is accepted, and could not be journalled in time.
        """
        began_s = time.monotonic()
        with self._turned:
            self._change(partial(setattr, self, "grant", grant))
            self._await(lambda: self._memory.state.queue.grant == self.grant, began_s)

    def drained(self, nodes: Mapping[str, float]) -> None:
        """Note nodes that are being drained, with deadlines in `time.time()` seconds, 0 without one. They stay noted
        once they are gone: a drain can't be undone."""
        with self._turned:
            known = {**self.draining, **nodes}
            is_new, self.draining = known != self.draining, known
        if is_new:
            wake(self._inbox)

    def _change(self, change: Callable[[], R]) -> R:
        """The result of `change`, once it can be made. Raises what it raises, and NotFinished."""
        if not self._turned.wait_for(lambda: self._is_open, PATIENCE_S):
            self._early.append(change)
            waits_s = time.monotonic() - self._began_s
            raise self._unrecorded(f"its controller has waited {waits_s:.0f} s for run storage")
        return change()

    def _await(self, is_journalled: Callable[[], bool], began_s: float) -> None:
        """Let the controller decide, and wait until it has. Raises NotFinished.

        Args:
            began_s: when the caller began to wait, in `time.monotonic()` seconds.
        """
        wake(self._inbox)
        deadline_s, patience_s = began_s + BUSY_S, began_s + PATIENCE_S - time.monotonic()
        while not self._turned.wait_for(is_journalled, max(patience_s, 0.0)):
            patience_s = PATIENCE_S
            self._refuse_ending(self.newest.finish)  # it has ended meanwhile
            no_turns = self._storage.is_pending(BEGIN)
            if no_turns or self._writer.unrecorded_s >= PATIENCE_S / 2 or time.monotonic() > deadline_s:
                trouble = self._memory.trouble or self._writer.trouble() or self._storage.trouble()
                why = trouble.why if trouble is not None else "its controller is busy"
                raise self._unrecorded(why)

    def _unrecorded(self, why: str) -> NotFinished:
        return NotFinished(
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
