"""Removal of a run that has ended from run storage and from MLflow, and of single checkpoints."""

import shutil
from pathlib import Path

from orchestrator.checkpoint.retention import discard
from orchestrator.errors import NotFound, StorageError, UsageError
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.checkpoints import path_of
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.tracker_setup import tracker_setup

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


def remove_files(run_dir: Path) -> None:
    """Remove a run's directory: at once under its name, then file by file. Prepared texts, which runs share, stay.

    Raises:
        StorageError: something can't be removed.
    """
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


def remove_tracked(run_dir: Path) -> str | None:
    """Delete the run in MLflow, which keeps it as deleted until `mlflow gc`. Returns its id there; None if there is no
    such run.

    Raises:
        OrchestratorError: MLflow does not answer.
    """
    from orchestrator.tracking.mlflow_removal import delete_run  # imports MLflow

    return delete_run(tracker_setup(run_dir.name, run_dir, RunFiles(run_dir).job()))


def find_removable(run_dir: Path, step: int) -> Path:
    """The checkpoint of `step`.

    Raises:
        NotFound: the run has none of this step.
        UsageError: it is the newest one of a run that has not ended, which would need it after a failure.
    """
    files = RunFiles(run_dir)
    there = {record.step: path for record in files.named_checkpoints() if (path := path_of(run_dir, record)).is_dir()}
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


def remove_checkpoint(path: Path) -> None:
    """Raises StorageError if it can't be removed."""
    try:
        discard(path)
    except OSError as error:
        raise StorageError(
            f"{path} can't be removed: {error.strerror or error}", remedy="Make run storage writable, and repeat it."
        ) from error
