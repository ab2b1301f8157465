"""Job of a run in run storage, written once, at submission."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from orchestrator.errors import NameTaken, NotFound, OrchestratorError, UsageError
from orchestrator.run_records.journaled_run import storage_error
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.probe import check_storage
from orchestrator.storage.journal import has_journal

JOB, TEXT = "job.json", "job.yaml"


def write_job(location: Location, job_json: str, job_text: str) -> None:
    """Store a run's job, resolved and as its user wrote it, in storage that was checked; if that fails nothing is left.

    Raises:
        NameTaken: another run has been submitted there meanwhile.
        UsageError, NotAllowed, StorageError: the storage can't be used.
    """
    objects = objects_at(location)
    try:
        check_storage(location)
        found = objects.create(JOB, job_json.encode())
        if found == job_json.encode():
            objects.delete([TEXT])  # of a submission that was cut off
            objects.create(TEXT, job_text.encode())
    except (OSError, OrchestratorError) as error:
        remove_job(location, job_json)
        if isinstance(error, OrchestratorError):
            raise
        raise storage_error(error, location) from error
    if found != job_json.encode():
        raise NameTaken(
            f"{location} holds a run {location.name}", remedy="Choose another name.", unchanged="Nothing was started."
        )


def remove_job(location: Location, job_json: str) -> None:
    """Remove what `write_job` has written, but no other run's job: the name must not be taken by a run that never
    began. One with a journal has begun, by another submission of the same job."""
    objects = objects_at(location)
    with suppress(OSError):
        if objects.get(JOB) == job_json.encode() and not has_journal(objects):
            objects.delete([TEXT, JOB])
    if isinstance(location, Path):
        with suppress(OSError):  # it isn't empty
            location.rmdir()


def has_job(location: Location) -> bool:
    """Whether a run was submitted there. Raises OSError."""
    return JOB in objects_at(location).names("")


def read_job(location: Location, digest: str = "") -> JobSpec:
    """The job of a run.

    Args:
        digest: SHA-256 that its file must have, by the run's journal; empty for any.

    Raises:
        NotFound: the location holds none.
        UsageError: its file can't be read, or isn't the one that was submitted.
    """
    try:
        data = objects_at(location).get(JOB)
        check_digest(location, data, digest)
        return JobSpec.model_validate_json(data)
    except FileNotFoundError:
        raise NotFound(f"{location} holds no run", unchanged="Nothing was started.") from None
    except ValueError as error:
        raise UsageError(
            f"{location / JOB} can't be read: {error}",
            remedy="It is written once, at submission; put the original back.",
            unchanged="Nothing was started.",
        ) from error


def check_digest(location: Location, data: bytes, digest: str) -> None:
    """Raise UsageError for a job's file with another SHA-256 than the one it was submitted with, unless that is empty,
    as it isn't known."""
    if digest and sha256(data).hexdigest() != digest:
        raise UsageError(
            f"{location / JOB} is not what was submitted: by the run's journal its sha256 is {digest}",
            remedy="Put the original back; to train with other settings, submit a new run.",
            unchanged="Nothing was started.",
        )
