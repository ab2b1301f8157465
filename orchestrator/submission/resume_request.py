"""Preparation of a resume: the run's directory, and the checkpoint that it begins from."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from orchestrator.checkpoint.hf.pretrained import check_base
from orchestrator.checkpoint.hf.teacher import check_teacher
from orchestrator.errors import NotFound
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_files import RunFiles, run_dir_in
from orchestrator.storage.backends.location import Location, location_of
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.submission.user_code import check_own_code, with_packages


def find_run_dir(run_id: str, storage: str | os.PathLike[str] | None, get: Callable[[str], RunStatus]) -> Location:
    """The run's location: in the named storage, else as `get` reports it, else in ./runs. Raises NotFound."""
    if storage is not None:
        return RunFiles(run_dir_in(location_of(os.fspath(storage)), run_id)).run_dir
    try:
        return location_of(get(run_id).run_dir)
    except NotFound as error:
        try:
            return RunFiles(run_dir_in(Path("runs"), run_id)).run_dir
        except NotFound:
            error.remedy += " A run of another cluster is found by its run storage: --storage DIR|URL."
            raise error from None


def code_of_now(run_dir: Location, key: SigningKey | None) -> tuple[dict[str, str] | None, dict[str, bytes]]:
    """Digests of the run's own code as it is on this machine now, by directories, and its packages by their digests.
    None if it is the one that the run uses already.

    Raises:
        EntrypointError: it can't be trained, or isn't here.
        UsageError: it can't be sent.
    """
    before = RunFiles(run_dir, key).job()
    job, packages = with_packages(before)
    if job.code == before.code:
        return None, {}
    check_own_code(job, packages)
    return job.code, packages


def resume_request(
    run_dir: Location,
    key: SigningKey | None,
    step: int | None,
    workers: int | None,
    reset_residuals: bool,
    code: dict[str, str] | None = None,
) -> ResumeRequest:
    """Request to resume from the checkpoint of `step` or the newest, digests checked; without any, from the beginning.

    Args:
        key: with which the run's records are signed; None for the one that this process knows, if any.

    Raises:
        KeyUnknown, JournalCorrupt: the records are not signed with it.
        NotFound: there is no checkpoint of this step.
        CheckpointCorrupt: its files are missing or changed; the message names the one before.
        UsageError: the weights beside its adapters, or of its teacher, have changed.
    """
    files, restore = RunFiles(run_dir, key), None
    job = files.job()
    check_base(job.model)
    check_teacher(job.distill)
    path = files.choose_checkpoint(step)
    if path is not None:
        record = next(record for record in files.named_checkpoints() if record.name == path.name)
        restore = Restore(record.step, str(path), reset_residuals, record.sha256)
    return ResumeRequest(uuid.uuid4().hex, restore, workers, is_named=step is not None, code=code)
