"""Packages of a user's code: the directories that a job names as `code_dir`, as they were when it was submitted.

RUN/code-SHA256.tar     in run storage, so that a run goes on with its code on any node, and in another cluster
HOME/code/SHA256/       unpacked, once per node; removed if no process has needed it for a while
"""

import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from orchestrator.code_archive import unpack
from orchestrator.errors import OrchestratorError, StorageError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.keys.section import with_code_dirs
from orchestrator.storage.atomic import new_directory
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.caller import Caller, call_here

UNUSED_S = 86400.0 * 7
_locks: dict[Path, int] = {}  # descriptors of the directories that this process uses
_submitted: dict[str, str] = {}  # by directory here, the one that its files were sent from


def package_name(digest: str) -> str:
    """Name of a package in its run's storage."""
    return f"code-{digest}.tar"


def placed(job: JobSpec, run_dir: Location, caller: Caller = call_here) -> JobSpec:
    """The job with the directories of its own code on this node, unpacked from run storage if missing. They stay until
    this process ends. A job that was submitted without packages is unchanged.

    Raises:
        StorageError: a package is missing.
        OSError: run storage can't be read.
        UsageError: it isn't the one that was submitted.
        OrchestratorError: it can't be written here.
    """
    places = {old: str(unpacked(run_dir / package_name(digest), caller)) for old, digest in job.code.items()}
    _submitted.update({place: old for old, place in places.items()})
    return with_code_dirs(job, lambda directory: places.get(directory, directory))


def of_user(text: str, submitted: Mapping[str, str] = _submitted) -> str:
    """The text with the user's own directories in place of those with their files.

    Args:
        submitted: the former by the latter; by default those of this process.
    """
    for place, directory in submitted.items():
        text = text.replace(place, directory)
    return text


def unpacked(package: Location, caller: Caller = call_here) -> Path:
    """The directory with a package's files on this node. Raises as `placed`."""
    digest = package.name.removeprefix("code-").removesuffix(".tar")
    directory = home() / "code" / digest
    while not _is_held(directory):
        data = _read(package, digest, caller)
        try:
            _remove_unused(directory.parent)
            with new_directory(directory) as partial:
                unpack(data, partial)
        except OSError as error:
            if directory.is_dir():
                continue  # another process was faster
            raise OrchestratorError(
                f"the job's code can't be unpacked in {directory}: {error}",
                remedy="Free space, or set ORCHESTRATOR_HOME to a directory that can be written, on every node.",
            ) from error
    return directory


def _read(package: Location, digest: str, caller: Caller) -> bytes:
    try:
        data = caller(objects_at(package.parent).get, package.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StorageError(
            f"{package}, the job's own code, is missing: {error.strerror or error}",
            remedy="It is written once, at submission: put it back.",
        ) from error
    if sha256(data).hexdigest() != digest:
        raise UsageError(
            f"{package} is not the code that was submitted: its sha256 is not the one in its name",
            remedy="Put the original back; to train with other code, submit a new run.",
        )
    return data


def _is_held(directory: Path) -> bool:
    """Whether the directory exists; if so, this process locks it, and it stays until the process ends."""
    try:
        os.utime(directory)
        if directory not in _locks:
            _locks[directory] = os.open(directory, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(_locks[directory], fcntl.LOCK_SH)
        os.stat(directory)
    except (FileNotFoundError, NotADirectoryError):  # or it was removed before it was locked
        _locks.pop(directory, None)
        return False
    return True


def _remove_unused(above: Path) -> None:
    old_s = time.time() - UNUSED_S
    for directory in above.glob("*"):
        with suppress(OSError):  # a process uses it, or another one removes it
            if directory.stat().st_mtime < old_s:
                descriptor = os.open(directory, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory)
                finally:
                    os.close(descriptor)
