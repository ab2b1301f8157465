"""Removal of a run that has ended from run storage and from MLflow, and of single checkpoints."""

import shutil
from pathlib import Path

from orchestrator.checkpoint.retention import discard
from orchestrator.errors import NotFound, StorageError, UsageError
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.checkpoints.search import path_of
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.tracker_setup import outbox_of, tracker_setup
from orchestrator.storage.backends.location import Location, is_there, objects_at
from orchestrator.storage.backends.probe import reading
from orchestrator.storage.backends.signed_objects import ADOPTED

REMOVED_PREFIX = ".removed-"  # no run's name: what an interrupted removal leaves is no run
UNCHANGED = "Nothing was removed."


def refuse_active(status: RunStatus) -> None:
    """Raises UsageError for a run that has not ended."""
    if not status.phase.ended:
        raise UsageError(
            f"run {status.run_id} has not ended: it is {status.phase}, {status.why}",
            remedy=f"End it with `orchestrator stop {status.run_id}`. If its cluster is gone for good, delete "
            f"{status.run_dir} yourself.",
            unchanged=UNCHANGED,
        )


def remove_files(run_dir: Location) -> None:
    """Remove all that is at a run's location. Prepared texts, which runs share, stay.

    Raises:
        StorageError: something can't be removed.
    """
    if isinstance(run_dir, Path):
        _remove_directory(run_dir)
    else:
        _remove_objects(run_dir)


def _remove_directory(run_dir: Path) -> None:
    """Remove a directory: its name first, by a rename, then its files."""
    hidden = run_dir.with_name(REMOVED_PREFIX + run_dir.name)
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        run_dir.rename(hidden)
    except OSError as error:
        raise StorageError(
            f"{run_dir} can't be removed: {error.strerror or error}",
            remedy="Make run storage writable.",
            unchanged=UNCHANGED,
        ) from error
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        raise StorageError(
            f"run {run_dir.name} is removed, but not all of its files: {error.strerror or error}: {error.filename}",
            remedy=f"Delete {hidden} yourself.",
        ) from error


def _remove_objects(run_dir: Location) -> None:
    """Remove a run's objects. What shows that it has ended goes last, so that a removal that is cut off is repeated."""
    objects = objects_at(run_dir)
    try:
        keys = [found.key for found in objects.objects("")]
        status = [key for key in keys if key.startswith(("status-", f"{ADOPTED}/"))]  # what verifies it, too
        records = [key for key in keys if key.startswith(("journal/", "job."))]
        objects.delete(set(keys) - {*status, *records})
        objects.delete(records)
        objects.delete(status)
        shutil.rmtree(outbox_of(run_dir), ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"run {run_dir.name} is not removed, or not all of it: {error.strerror or error}: {error.filename}",
            remedy=f"`orchestrator rm {run_dir.name}` tries again.",
        ) from error


def remove_tracked(run_dir: Location) -> str | None:
    """Delete the run in MLflow, which keeps it as deleted until `mlflow gc`. Returns its id there; None if there is no
    such run.

    Raises:
        OrchestratorError: MLflow does not answer.
    """
    from orchestrator.tracking.mlflow_removal import delete_run  # imports MLflow

    return delete_run(tracker_setup(run_dir.name, run_dir, RunFiles(run_dir).job()))


class TrackedRun:
    """The run in MLflow, for a process that deletes it there."""

    def __init__(self, run_dir: Location) -> None:
        self._run_dir = run_dir

    def remove(self) -> None:
        """As `remove_tracked`."""
        remove_tracked(self._run_dir)


def find_removable(run_dir: Location, step: int) -> Location:
    """The checkpoint of `step`.

    Raises:
        NotFound: the run has none of this step.
        UsageError: it is the newest one of a run that has not ended, which would need it after a failure.
    """
    files = RunFiles(run_dir)
    named = {record.step: path_of(run_dir, record) for record in files.named_checkpoints()}
    with reading(run_dir):
        there = {step: path for step, path in named.items() if is_there(path)}
    if step not in there:
        raise NotFound(
            f"run {run_dir.name} has no checkpoint of step {step}",
            remedy=f"It has those of {', '.join(map(str, there)) or 'no step'}.",
            unchanged=UNCHANGED,
        )
    if step == max(there) and not files.status().phase.ended:
        raise UsageError(
            f"the checkpoint of step {step} is the newest of run {run_dir.name}, which has not ended and may need it",
            remedy="Remove it after the run's end.",
            unchanged=UNCHANGED,
        )
    return there[step]


def remove_checkpoint(path: Location) -> None:
    """Raises StorageError if it can't be removed."""
    try:
        discard(path)
    except OSError as error:
        raise StorageError(
            f"{path} can't be removed: {error.strerror or error}", remedy="Make run storage writable, and repeat it."
        ) from error
