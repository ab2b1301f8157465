"""Checkpoints of a run for its controller: the newest one, the one to restore, commits and deletions."""

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from orchestrator.controller.startup import OpenedRun
from orchestrator.errors import OrchestratorError, TermSuperseded
from orchestrator.policy.state.checkpoint_parts import can_complete
from orchestrator.policy.state.run_state import Commit, Observation, RunState
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


class RunCheckpoints:
    """Checkpoints of one run."""

    def __init__(self, run: OpenedRun) -> None:
        self._run, self._memory = run, run.memory
        self._caller = run.caller
        self._finder = CheckpointFinder(run.run_dir, run.caller)
        self._faults: list[str] = []
        self._refused_s, self._made_room_s = -COMMIT_AGAIN_S, -ROOM_AGAIN_S
        self.trouble: StorageTrouble | None = None  # why a checkpoint of which all parts are written isn't complete
        self.newest = run.memory.state.checkpoint  # (generation, step) of the newest complete checkpoint

    @property
    def faults(self) -> tuple[str, ...]:
        """Checkpoints that could not be completed."""
        return tuple(self._faults)

    @property
    def unreadable(self) -> str:
        """Why it is unknown now which checkpoint can be restored, while a restore is wanted."""
        return self._finder.trouble if self._memory.state.wants_restore else ""

    def restorable(self) -> StorageTask[Restore | None]:
        """The newest good checkpoint, if a restore is wanted. Verifies digests, which may take long."""
        if not self._memory.state.wants_restore:
            return None
        found: Restore | None = yield Lengthy(partial(self._finder.newest_good, time.monotonic()))
        return found

    def commit(self, action: Commit) -> StorageTask[Path | None]:
        """Complete a checkpoint. Returns its path; None if that failed: it is a fault, unless storage refused it, which
        is tried again. Raises TermSuperseded.
        """
        if time.monotonic() - self._refused_s < COMMIT_AGAIN_S:
            return None
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
            return None
        self.trouble = None
        return path

    def went_back(self, step: int) -> StorageTask[None]:
        """Set aside the checkpoints after `step`, which the run goes back to; else the next commit does it."""
        state = self._memory.state
        self.newest = state.checkpoint
        with suppress(OSError):
            yield partial(self._caller, leave_behind, self._run.run_dir, step, self._memory.term, state.num_generations)

    def make_room(self, state: RunState, seen: Observation) -> StorageTask[None]:
        """Delete what no checkpoint needs any more, at intervals, while storage refuses parts or markers: parts that
        can't be completed, and on a full disk checkpoints that were set aside."""
        if time.monotonic() - self._made_room_s >= ROOM_AGAIN_S:
            self._made_room_s = time.monotonic()
            with suppress(OSError):
                run_dir, needed = self._run.run_dir, partial(can_complete, state, seen)
                yield Lengthy(partial(self._caller, discard_unfinished, run_dir, self._memory.term, needed))
                yield Lengthy(partial(self._caller, drop_superseded, self._run.run_dir))

    def drop_old(self) -> StorageTask[tuple[int, ...]]:
        """Delete checkpoints that the job doesn't keep. Returns their steps."""
        validations = self._memory.progress.validations
        run_dir, keep = self._run.run_dir, self._run.job.checkpoint
        drop = partial(self._caller, drop_old_checkpoints, run_dir, keep, validations)
        dropped: tuple[int, ...] = yield Lengthy(drop)
        return dropped
