"""Checkpoints of a run for its controller: the newest one, the one to restore, commits and deletions.

No decision waits for a call to storage: calls are tasks of their own, whose results later decisions see.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from orchestrator.cluster.inbox import Inbox, wake
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.requests import GO_BACK
from orchestrator.controller.startup import OpenedRun
from orchestrator.errors import OrchestratorError, TermSuperseded
from orchestrator.policy.state.checkpoint_parts import can_complete
from orchestrator.policy.state.run_state import Commit, Observation
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsDeleted
from orchestrator.protocol.messages import Restore
from orchestrator.run_records.checkpoints import (
    CheckpointFinder,
    commit_checkpoint,
    discard_unfinished,
    drop_old_checkpoints,
    drop_superseded,
    leave_behind,
)
from orchestrator.storage.condition import StorageTrouble, refusal
from orchestrator.storage.tasks import Lengthy, StorageTask

COMMIT_AGAIN_S = 1.0  # until a refused commit is repeated
ROOM_AGAIN_S = 5.0  # between two looks for what may be deleted

Note = Callable[[Event], StorageTask[None]]


class RunCheckpoints:
    """Checkpoints of one run."""

    def __init__(self, run: OpenedRun, storage: StorageThread, inbox: Inbox) -> None:
        self._run, self._memory = run, run.memory
        self._caller, self._storage, self._inbox = run.caller, storage, inbox
        self._finder = CheckpointFinder(run.run_dir, run.caller)
        self._faults: list[str] = []
        self._refused_s, self._made_room_s = -COMMIT_AGAIN_S, -ROOM_AGAIN_S
        self.trouble: StorageTrouble | None = None  # why a checkpoint of which all parts are written isn't complete
        self.newest = run.memory.state.checkpoint  # (generation, step) of the newest complete checkpoint
        self.restorable: Restore | None = None  # the newest good one, if a restore is wanted
        self._is_known, self._num_searches = False, 0  # whether that holds; counts those that became void
        self._left_behind = -1  # the run has gone back behind all checkpoints of generations before this one

    @property
    def faults(self) -> tuple[str, ...]:
        """Checkpoints that could not be completed."""
        return tuple(self._faults)

    @property
    def is_searching(self) -> bool:
        """Whether a restore is wanted, and `restorable` isn't known yet."""
        return self._memory.state.wants_restore and not self._is_known

    @property
    def unreadable(self) -> str:
        """Why it is unknown now which checkpoint can be restored, while a restore is wanted."""
        return self._finder.trouble if self._memory.state.wants_restore else ""

    @property
    def is_going_back(self) -> bool:
        """Whether checkpoints behind which the run has gone back are being set aside."""
        return self._storage.is_pending(GO_BACK)

    def search(self) -> None:
        """Search for the newest good checkpoint if a restore is wanted. Verifies digests, which may take long."""
        if not self._memory.state.wants_restore:
            self._forget()
        elif not self._is_known and not self._storage.is_pending("search"):
            self._storage.add("search", partial(self._search, self._num_searches))

    def _forget(self) -> None:
        """Void what a search has found, or finds."""
        if self._is_known or self._storage.is_pending("search"):
            self.restorable, self._is_known = None, False
            self._num_searches += 1

    def _search(self, number: int) -> StorageTask[None]:
        found: Restore | None = yield Lengthy(partial(self._finder.newest_good, time.monotonic()))
        if number == self._num_searches and not self._finder.trouble:
            self.restorable, self._is_known = found, True
            wake(self._inbox)

    def commit(self, action: Commit, note: Note) -> None:
        """Complete a checkpoint, then delete those that the job doesn't keep; `note` journals both. It is a fault if
        that fails, unless storage refused it: then it is tried again by a later call."""
        name = f"commit {action.generation}-{action.step}"
        if time.monotonic() - self._refused_s >= COMMIT_AGAIN_S and not self._storage.is_pending(name):
            self._storage.add(name, partial(self._commit, action, note))

    def _commit(self, action: Commit, note: Note) -> StorageTask[None]:
        path = (yield from self._complete(action)) if action.generation >= self._left_behind else None
        if path is None or action.generation < self._left_behind:
            return
        self._forget()
        yield from note(CheckpointCommitted(action.step, str(path)))
        if action.generation < self._left_behind:
            return
        self.newest = (action.generation, action.step)
        wake(self._inbox)
        deleted = yield from self._drop_old()
        if deleted:
            yield from note(CheckpointsDeleted(deleted))

    def _complete(self, action: Commit) -> StorageTask[Path | None]:
        """Write the checkpoint's marker. Returns its path; None if that failed."""
        try:
            run_id, run_dir = self._run.run_id, self._run.run_dir
            path: Path = yield partial(self._caller, commit_checkpoint, run_id, run_dir, self._memory.term, action)
        except TermSuperseded:
            raise
        except OSError as error:
            self._refused_s = time.monotonic()
            self.trouble = refusal("a checkpoint can't be written", error)
            return None
        except OrchestratorError as error:
            self._faults.append(f"the checkpoint of step {action.step} could not be completed: {error}")
            wake(self._inbox)
            return None
        self.trouble = None
        return path

    def went_back(self, step: int) -> None:
        """Set aside the checkpoints after `step`, which the run goes back to; else the next commit does it."""
        state = self._memory.state
        first = state.checkpoint_generation + 1  # may be planned already
        self.newest, self._left_behind = state.checkpoint, first
        self._storage.add(GO_BACK, partial(self._leave_behind, step, first))

    def _leave_behind(self, step: int, generation: int) -> StorageTask[None]:
        with suppress(OSError):
            yield partial(self._caller, leave_behind, self._run.run_dir, step, self._memory.term, generation)
        wake(self._inbox)

    def make_room(self, observe: Callable[[], Observation]) -> None:
        """Delete what no checkpoint needs any more, at intervals, while storage refuses parts or markers: parts that
        can't be completed, and on a full disk checkpoints that were set aside."""
        if time.monotonic() - self._made_room_s >= ROOM_AGAIN_S:
            self._made_room_s = time.monotonic()
            self._storage.add("room", partial(self._make_room, observe))

    def _make_room(self, observe: Callable[[], Observation]) -> StorageTask[None]:
        with suppress(OSError):
            run_dir, needed = self._run.run_dir, partial(can_complete, self._memory.state, observe())
            yield Lengthy(partial(self._caller, discard_unfinished, run_dir, self._memory.term, needed))
            yield Lengthy(partial(self._caller, drop_superseded, self._run.run_dir))

    def _drop_old(self) -> StorageTask[tuple[int, ...]]:
        """Delete checkpoints that the job doesn't keep. Returns their steps."""
        validations = self._memory.progress.validations
        run_dir, keep = self._run.run_dir, self._run.job.checkpoint
        drop = partial(self._caller, drop_old_checkpoints, run_dir, keep, validations)
        dropped: tuple[int, ...] = yield Lengthy(drop)
        return dropped
