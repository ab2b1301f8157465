"""Job of a run in run storage, written once, at submission."""

import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from orchestrator.code_package import package_name
from orchestrator.errors import NameTaken, NotFound, OrchestratorError, UsageError
from orchestrator.run_records.journaled_run import storage_error
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.probe import check_storage
from orchestrator.storage.backends.signed_objects import SignedObjects
from orchestrator.storage.chain_reader import has_journal

JOB, TEXT = "job.json", "job.yaml"
NO_CODE: Mapping[str, bytes] = {}


def write_job(location: Location, job_json: str, job_text: str, code: Mapping[str, bytes] = NO_CODE) -> None:
    """Store a run's job, resolved and as its user wrote it, in storage that was checked; if that fails nothing is left.

    Args:
        code: packages of the job's own code, by their digests.

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
            write_code(location, code)
    except (OSError, OrchestratorError) as error:
        remove_job(location, job_json)
        if isinstance(error, OrchestratorError):
            raise
        raise storage_error(error, location) from error
    if found != job_json.encode():
        raise NameTaken(
            f"{location} holds a run {location.name}", remedy="Choose another name.", unchanged="Nothing was started."
        )


def write_code(location: Location, code: Mapping[str, bytes]) -> None:
    """Store packages of a run's own code. Raises OSError."""
    for digest, package in code.items():
        objects_at(location).create(package_name(digest), package)


def remove_job(location: Location, job_json: str) -> None:
    """Remove the files of `write_job`, but no other run's job: the name must not be taken by a run that never
    began. One with a journal has begun, by another submission of the same job."""
    objects = objects_at(location)
    with suppress(OSError):
        if objects.get(JOB) == job_json.encode() and not has_journal(objects):
            packages = map(package_name, json.loads(job_json).get("code", {}).values())
            objects.delete([*packages, TEXT, JOB])
    if isinstance(location, Path):
        with suppress(OSError):  # it isn't empty
            location.rmdir()


def has_job(location: Location) -> bool:
    """Whether a run was submitted there. Raises OSError."""
    return JOB in objects_at(location).names("")


def read_job(location: Location, digest: str = "", records: SignedObjects | None = None) -> JobSpec:
    """The job of a run, checked as `check_job` does.

    Raises:
        NotFound: the location holds none.
        UsageError: its file can't be read, or isn't the one that was submitted.
    """
    try:
        data = objects_at(location).get(JOB)
        check_job(location, data, digest, records)
        return JobSpec.model_validate_json(data)
    except FileNotFoundError:
        raise NotFound(f"{location} holds no run", unchanged="Nothing was started.") from None
    except ValueError as error:
        raise UsageError(
            f"{location / JOB} can't be read: {error}",
            remedy="It is written once, at submission; put the original back.",
            unchanged="Nothing was started.",
        ) from error


def check_job(location: Location, data: bytes, digest: str, records: SignedObjects | None) -> None:
    """Check that a job's file is the one that was submitted.

    Args:
        digest: SHA-256 that it was submitted with; empty if that isn't known, which a signed run allows only if the
            file was adopted.
        records: of the run.

    Raises:
        UsageError: it isn't, or may not be.
    """
    if sha256(data).hexdigest() == digest:
        return
    if digest:
        raise UsageError(
            f"{location / JOB} is not what was submitted: by the run's journal its sha256 is {digest}",
            remedy="Put the original back; to train with other settings, submit a new run.",
            unchanged="Nothing was started.",
        )
    if records is not None and records.signer is not None and not records.has_adopted(JOB, data):
        raise UsageError(
            f"{location / JOB} may not be what was submitted: the run is signed, and its journal has no digest of it",
            remedy="Submit it again under another name; a run that hasn't trained has no state to resume from.",
            unchanged="Nothing was started.",
        )
