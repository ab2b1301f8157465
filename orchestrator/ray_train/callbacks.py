"""Calls a user's `ray.train.UserCallback`s in the process of `fit`, from what is new in a run's journal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train import Checkpoint
from ray.train.v2._internal.execution.context import TrainRunContext  # an argument of callbacks, public nowhere else
from ray.train.v2.api.callback import UserCallback

from orchestrator.errors import OrchestratorError
from orchestrator.policy.state.progress import RECENT_STEPS, Progress, absorb
from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted, StepsCommitted
from orchestrator.ray_train.results import Row, rows_of
from orchestrator.run_records.rollback import progress_up_to
from orchestrator.run_records.run_history import committed_steps, read_entries
from orchestrator.storage.backends.signing_keys import run_objects


class CallbackError(Exception):
    """A user's callback raised."""

    def __init__(self, message: str, raised: Exception) -> None:
        super().__init__(message)
        self.raised = raised


class Follower:
    """Reports a run's commits and failures of members to callbacks, from the moment of its construction.

    `failures` are those of members after which no step was done: rank in the world that they ended, and error.

    Args:
        run_dir: the run's directory in run storage; it may not exist yet.
    """

    def __init__(self, run_dir: Path, callbacks: Sequence[UserCallback], context: TrainRunContext) -> None:
        self.failures: dict[int, Exception] = {}
        self._failed_after = -1  # step
        self._run_dir = run_dir
        self._callbacks: Sequence[UserCallback] = ()
        self._context = context
        self._after = -1
        self._progress = Progress()
        self._rows: dict[int, list[Row]] = {}  # of the newest steps, one per member
        self._unreported: dict[int, str] = {}  # checkpoints whose step isn't committed yet
        self._state: RunState | None = None
        self.read_on()
        self.failures = {}
        self._callbacks = callbacks

    def read_on(self) -> None:
        """Process new entries of the journal. Raises CallbackError."""
        for entry in read_entries(self._run_dir, self._after):
            self._after = entry.seq
            match entry.event:
                case StepsCommitted():
                    self._enter_steps(entry)
                case Resumed(step=step):
                    objects = run_objects(self._run_dir)
                    self._progress = progress_up_to(objects, self._progress, step, before=entry.seq)
                case CheckpointCommitted(step, path):
                    self._unreported[step] = path
                case StateDecided(state):
                    self._enter_state(state)
            self._report_checkpoints()

    def _enter_steps(self, entry: JournalEntry) -> None:
        records = [record for record in committed_steps([entry]) if record.step > self._progress.watermark]
        for row, record in zip(rows_of(self._progress, records), records, strict=True):
            self._rows[record.step] = [row] * record.world_size
            self._call("after_report", metrics=_copies(self._rows[record.step]), checkpoint=None)
        self._progress = absorb(self._progress, records)
        if self._progress.watermark > self._failed_after:
            self.failures = {}
        for step in list(self._rows)[:-RECENT_STEPS]:
            del self._rows[step]

    def _report_checkpoints(self) -> None:
        for step in [step for step in self._unreported if step <= self._progress.watermark]:
            checkpoint = Checkpoint.from_directory(self._unreported.pop(step))
            metrics = self._rows.get(step, [{"step": step}])
            self._call("after_report", metrics=_copies(metrics), checkpoint=checkpoint)

    def _enter_state(self, state: RunState) -> None:
        before, self._state = self._state, state
        if before is None:
            return
        fresh = [
            failure
            for failure in state.failures.recent
            if failure not in before.failures.recent and failure.worker in before.members
        ]
        if fresh:
            ranks = {failure.worker: before.members.index(failure.worker) for failure in fresh}
            self.failures = {ranks[one.worker]: _error_of(one.worker, one.cause, state) for one in fresh}
            self._failed_after = fresh[-1].step
            self._call("after_exception", worker_exceptions=dict(self.failures))

    def _call(self, method: str, **arguments: Any) -> None:
        for callback in self._callbacks:
            try:
                getattr(callback, method)(run_context=self._context, **arguments)
            except Exception as error:
                raise CallbackError(f"{type(callback).__name__}.{method} failed: {error!r}", error) from error


def _copies(rows: Sequence[Row]) -> list[Row]:
    return [dict(row) for row in rows]


def _error_of(worker: str, cause: str, state: RunState) -> Exception:
    """The failure of a member as an error; the traceback of its own error, where there is one, is a note of it."""
    is_named = state.why.startswith(f"{worker} ")
    error = OrchestratorError(state.why if is_named else f"{worker} failed: {cause}")
    if is_named and state.traceback:
        error.add_note(state.traceback)
    return error
