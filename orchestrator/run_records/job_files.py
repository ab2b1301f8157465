"""Job of a run in run storage, written once, at submission."""

from contextlib import suppress
from pathlib import Path

from orchestrator.errors import NotFound, UsageError
from orchestrator.run_records.journaled_run import storage_error
from orchestrator.spec.job import JobSpec
from orchestrator.storage.atomic import write_atomically
from orchestrator.storage.directory import DirectoryObjects


def write_job(directory: Path, job_json: str, job_text: str) -> None:
    """Create a run's directory with its job, resolved and as its user wrote it; on a StorageError nothing is left."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "job.yaml", job_text)
        DirectoryObjects(directory).create("job.json", job_json.encode())  # as the journal's entries will be
    except (OSError, UsageError) as error:
        remove_job(directory)
        if isinstance(error, UsageError):
            raise
        raise storage_error(error, directory) from error


def remove_job(directory: Path) -> None:
    """Remove what `write_job` has written: the name must not be taken by a run that never began."""
    with suppress(OSError):
        for name in ("job.yaml", "job.json"):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def read_job(directory: Path) -> JobSpec:
    """The job of a run. Raises NotFound if the directory holds none, UsageError if its file can't be read."""
    try:
        return JobSpec.model_validate_json((directory / "job.json").read_text())
    except FileNotFoundError:
        raise NotFound(f"{directory} holds no run", unchanged="Nothing was started.") from None
    except ValueError as error:
        raise UsageError(
            f"{directory / 'job.json'} can't be read: {error}",
            remedy="It is written once, at submission; put the original back.",
            unchanged="Nothing was started.",
        ) from error
