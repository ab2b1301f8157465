"""Checkpoints of a run for its controller: the newest one, the one to restore, commits and deletions.

The journal decides: a checkpoint is complete once it is named there, and is deleted once it is no longer. A controller
that was superseded can journal neither. No decision waits for a call to storage: calls are tasks of their own, whose
results later decisions see.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from orchestrator.checkpoint.manifest import checkpoint_name, parse_checkpoint_name
from orchestrator.cluster.inbox import Inbox, wake
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.controller.startup import OpenedRun
from orchestrator.errors import OrchestratorError
from orchestrator.policy.state.checkpoint_parts import can_complete
from orchestrator.policy.state.run_state import Commit, Observation
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsAbandoned, CheckpointsDeleted
from orchestrator.protocol.messages import Restore
from orchestrator.run_records.checkpoints.completion import (
    commit_checkpoint,
    discard_garbage,
    drop_set_aside,
    hopeless,
    superfluous,
)
from orchestrator.run_records.checkpoints.search import CheckpointFinder, path_of
from orchestrator.storage.condition import StorageCondition, StorageTrouble, refusal
from orchestrator.storage.tasks import Lengthy, StorageTask

log = logging.getLogger("orchestrator.control")

COMMIT_AGAIN_S = 1.0  # until a refused commit is repeated
MOST_COMMITS = 3  # of a checkpoint whose parts aren't what their ranks wrote: a bit may flip on its way here
ROOM_AGAIN_S = 5.0  # between two looks for what may be deleted


class Note(Protocol):
    """Journals an event; what follows waits until run storage has it, if it is to be `stored`."""

    def __call__(self, event: Event, stored: bool = False) -> StorageTask[None]: ...


class RunCheckpoints:
    """Checkpoints of one run; `note` journals what becomes of them."""

    def __init__(self, run: OpenedRun, storage: StorageThread, inbox: Inbox, note: Note) -> None:
        self._run, self._memory, self._note = run, run.memory, note
        self._caller, self._storage, self._inbox = run.caller, storage, inbox
        self._finder = CheckpointFinder(run.run_dir, run.caller)
        self._damaged: Counter[str] = Counter()  # attempts to complete a checkpoint with damaged parts, by its name
        self._refused_s, self._made_room_s = -COMMIT_AGAIN_S, -ROOM_AGAIN_S
        self.trouble: StorageTrouble | None = None  # why a checkpoint of which all parts are written isn't complete
        self.restorable: Restore | None = None  # the newest good one, if a restore is wanted
        self._is_known, self._num_searches = False, 0  # whether that holds; counts those that became void
        self._commits: dict[str, Commit] = {}  # the newest ones, by the names of their tasks
        self._keeps_all = False  # those that the job doesn't keep wait for the end of a restore
        self._apply_retention()  # which a controller before this one may have left undone

    @property
    def newest(self) -> tuple[int, int]:
        """(generation, step) of the newest complete checkpoint, or of the one that the run has gone back to."""
        return max(self._memory.state.checkpoint, self._memory.checkpoints.newest)

    @property
    def paths(self) -> dict[int, str]:
        """Directories of the complete checkpoints, by step."""
        return {record.step: str(path_of(self._run.run_dir, record)) for record in self._memory.checkpoints.current}

    @property
    def abandoned(self) -> frozenset[tuple[int, int]]:
        """(generation, step) of checkpoints that won't be completed, though all parts may be written."""
        names = map(parse_checkpoint_name, self._memory.checkpoints.abandoned)
        return frozenset((generation, step) for step, _, generation in filter(None, names))

    @property
    def is_searching(self) -> bool:
        """Whether a restore is wanted, and `restorable` isn't known yet, as it isn't while commits or deletions are
        under way."""
        is_changing = self._under_way() or self._storage.is_pending("retention")
        return self._memory.state.wants_restore and not (self._is_known and not is_changing)

    @property
    def _is_restoring(self) -> bool:
        """Whether a checkpoint is searched, or is to be read by workers, who may find it damaged."""
        state = self._memory.state
        return state.wants_restore or (state.current is None and state.restore is not None)

    @property
    def unreadable(self) -> str:
        """Why it is unknown now which checkpoint can be restored, while a restore is wanted."""
        return self._finder.trouble if self._memory.state.wants_restore else ""

    def search(self) -> None:
        """Search for the newest good checkpoint if a restore is wanted. Workers verify what they read of it;
        once one has found damage, checkpoints are read here first, which may take long."""
        if not self._memory.state.wants_restore:
            self._forget()
            if self._keeps_all and not self._is_restoring:
                self._keeps_all = False
                self._apply_retention()
        elif not self._is_known and not self._storage.is_pending("search"):
            self._storage.add("search", partial(self._search, self._num_searches))

    def _forget(self) -> None:
        """Void the result of a search, finished or running."""
        if self._is_known or self._storage.is_pending("search"):
            self.restorable, self._is_known = None, False
            self._num_searches += 1

    def _search(self, number: int) -> StorageTask[None]:
        records = self._memory.checkpoints
        reads_files = self._memory.state.current is None  # by the generation that was to begin from a checkpoint
        found: Restore | None = yield Lengthy(partial(self._finder.newest_good, time.monotonic(), records, reads_files))
        if number == self._num_searches and not self._finder.trouble:
            self.restorable, self._is_known = found, True
            wake(self._inbox)

    def commit(self, action: Commit) -> None:
        """Complete a checkpoint, then delete those that the job doesn't keep. If that fails it is tried again by a
        later call, but with damaged parts only a few times: then the checkpoint is abandoned."""
        name = f"commit {action.generation}-{action.step}"
        if time.monotonic() - self._refused_s >= COMMIT_AGAIN_S and not self._storage.is_pending(name):
            self._commits = {name: action, **{n: a for n, a in self._commits.items() if self._storage.is_pending(n)}}
            self._storage.add(name, partial(self._commit, action), Lane.RECORDS)

    def _under_way(self) -> list[Commit]:
        """Checkpoints that are being completed."""
        return [action for name, action in self._commits.items() if self._storage.is_pending(name)]

    def _commit(self, action: Commit) -> StorageTask[None]:
        committed = None if self._is_void(action) else (yield from self._complete(action))
        if committed is None or self._is_void(action):
            return
        yield from self._note(committed, stored=True)  # deletions, which can't be undone, build on it
        self._forget()
        wake(self._inbox)
        self._apply_retention()

    def _apply_retention(self) -> None:
        """Delete checkpoints that the job doesn't keep, and files of those that the journal doesn't name any more."""
        self._storage.add("retention", self._retain, Lane.RECORDS)

    def _retain(self) -> StorageTask[None]:
        with suppress(OSError):  # tried again after the next checkpoint, and to make room
            yield from self._drop_old()
        self._storage.add("garbage", self._discard_garbage)

    def _drop_old(self) -> StorageTask[None]:
        """Journal which checkpoints the job doesn't keep. Until one is restored, all are kept."""
        memory, keep = self._memory, self._run.job.checkpoint
        call = partial(superfluous, self._run.run_dir, memory.checkpoints, keep, memory.progress.validations)
        dropped: tuple[int, ...] = yield partial(self._caller, call)
        if self._is_restoring:
            self._keeps_all = True
        elif dropped:
            yield from self._note(CheckpointsDeleted(dropped), stored=True)
            self._forget()

    def _is_void(self, action: Commit) -> bool:
        """Whether the run has gone back behind this checkpoint meanwhile, has abandoned it, or has completed it or a
        later one."""
        records = self._memory.checkpoints
        moment = (action.generation, action.step)
        is_abandoned = checkpoint_name(action.step, action.term, action.generation) in records.abandoned
        return is_abandoned or moment <= records.newest or records.is_left_behind(*moment)

    def _complete(self, action: Commit) -> StorageTask[CheckpointCommitted | None]:
        """Write the checkpoint's manifest. Returns the event that completes it; None if that failed."""
        try:
            run_id, run_dir = self._run.run_id, self._run.run_dir
            committed: CheckpointCommitted = yield partial(self._caller, commit_checkpoint, run_id, run_dir, action)
        except OSError as error:
            self._refused_s = time.monotonic()
            self.trouble = refusal("a checkpoint can't be written", error)
            return None
        except OrchestratorError as error:
            yield from self._note_damage(action, error)
            return None
        self.trouble = None
        return committed

    def _note_damage(self, action: Commit, error: OrchestratorError) -> StorageTask[None]:
        """Have a checkpoint tried again, or abandon it: the state is still in the workers' memory."""
        name = checkpoint_name(action.step, action.term, action.generation)
        why = f"the checkpoint of step {action.step} can't be completed: {error.message}"
        self._damaged[name] += 1
        self._refused_s = time.monotonic()
        self.trouble = StorageTrouble(StorageCondition.AWAY, why)
        log.error(why)
        if self._damaged[name] >= MOST_COMMITS:
            yield from self._note(CheckpointsAbandoned((name,)), stored=True)
            wake(self._inbox)

    def _discard_garbage(self) -> StorageTask[None]:
        """Delete the files of checkpoints that the journal doesn't name any more."""
        with suppress(OSError):
            yield Lengthy(partial(self._caller, discard_garbage, self._run.run_dir, self._memory.checkpoints))

    def make_room(self, observe: Callable[[], Observation]) -> None:
        """Delete files, at intervals, while storage refuses parts or manifests: checkpoints that the job doesn't keep,
        parts that can't be completed, and on a full disk checkpoints that were set aside."""
        if time.monotonic() - self._made_room_s >= ROOM_AGAIN_S:
            self._made_room_s = time.monotonic()
            self._apply_retention()
            self._storage.add("room", partial(self._make_room, observe), Lane.RECORDS)

    def _make_room(self, observe: Callable[[], Observation]) -> StorageTask[None]:
        """Journal which checkpoints can't be completed any more. In the lane of commits, so none goes on meanwhile."""
        run_dir, memory = self._run.run_dir, self._memory
        under_way = tuple((a.step, a.term, a.generation) for a in self._under_way())
        needed = partial(_is_needed, under_way, partial(can_complete, memory.state, observe()))
        with suppress(OSError):
            call = partial(self._caller, hopeless, run_dir, memory.checkpoints, needed)
            names: tuple[str, ...] = yield Lengthy(call)
            if names:
                yield from self._note(CheckpointsAbandoned(names), stored=True)
        self._storage.add("garbage", self._discard_garbage)
        self._storage.add("set aside", self._drop_set_aside)

    def _drop_set_aside(self) -> StorageTask[None]:
        memory = self._memory
        if memory.is_stored:  # else that the run has gone back may be on record in the cluster alone
            with suppress(OSError):
                yield Lengthy(partial(self._caller, drop_set_aside, self._run.run_dir, memory.checkpoints))


def _is_needed(
    under_way: Sequence[tuple[int, int, int]],
    can_complete: Callable[[int, int, int], bool],
    step: int,
    term: int,
    generation: int,
) -> bool:
    return (step, term, generation) in under_way or can_complete(step, term, generation)
