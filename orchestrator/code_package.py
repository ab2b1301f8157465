"""Packages of a user's code: the directories that a job names as `code_dir`, as they were when it was submitted.

RUN/code-SHA256.tar     in run storage, so that a run goes on with its code on any node, and in another cluster
HOME/code/SHA256/       unpacked, once per node; removed if no process has needed it for a while
"""

import fcntl
import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from orchestrator.errors import OrchestratorError, StorageError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.section import with_code_dirs
from orchestrator.storage.atomic import new_directory
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.caller import Caller, call_here

LEFT_OUT = [".git", ".venv", "venv", "runs", "mlruns", "__pycache__", "*.pyc", ".*_cache", "node_modules"]
MOST_BYTES = 100 << 20
UNUSED_S = 86400.0 * 7
UNCHANGED = "Nothing was started."
_locks: dict[Path, int] = {}  # descriptors of the directories that this process uses


def is_left_out(path: Path) -> bool:
    """Whether a file or folder isn't sent, by its name."""
    return any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)


def contents(directory: Path, leaves_out: Callable[[Path], bool] = is_left_out) -> list[Path]:
    """Files and links in a directory, sorted; links are not followed. Raises UsageError if the files are too large."""
    sizes: dict[Path, int] = {}
    total = 0
    for folder, folders, files in os.walk(directory):
        paths = [path for name in (*folders, *files) if not leaves_out(path := Path(folder, name))]
        folders[:] = [path.name for path in paths if path.is_dir() and not path.is_symlink()]
        found = {path: path.lstat().st_size for path in paths if path.is_symlink() or path.is_file()}
        sizes |= found
        total += sum(found.values())
        if total > MOST_BYTES:  # at once: it may be a whole disk
            largest = max(sizes, key=lambda path: sizes[path])
            raise UsageError(
                f"{directory} can't be sent to the cluster: it holds more than {MOST_BYTES >> 20} MiB, "
                f"{largest.relative_to(directory)} alone {sizes[largest] >> 20} MiB",
                remedy="Submit from a directory with the job file and the code it needs, or name that of the code by "
                "code_dir; leave data where the cluster's nodes see it.",
                unchanged=UNCHANGED,
            )
    return sorted(sizes)


def packed(directory: Path, storage: Location) -> bytes:
    """A tar file of a directory, the same bytes for the same files. Left out are virtual environments, and what is not
    code by its name. A link that leads out of the directory leads to the same place when unpacked.

    Args:
        storage: run storage, which is left out too.

    Raises:
        UsageError: the directory is too large, or can't be read.
    """
    apart = (storage, home())
    archive = io.BytesIO()
    try:
        paths = contents(directory, lambda p: is_left_out(p) or p in apart or (p / "pyvenv.cfg").exists())
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in paths:
                info, data = tarfile.TarInfo(path.relative_to(directory).as_posix()), b""
                if path.is_symlink():
                    info.type, info.linkname = tarfile.SYMTYPE, _target(path, directory.resolve())
                else:
                    data = path.read_bytes()
                    info.size, info.mode = len(data), 0o755 if path.stat().st_mode & 0o100 else 0o644
                tar.addfile(info, io.BytesIO(data))
    except OSError as error:
        raise UsageError(
            f"code_dir {directory} can't be sent to the cluster: {error.strerror or error}: {error.filename}",
            remedy="Make it readable, or name another directory.",
            unchanged=UNCHANGED,
        ) from error
    return archive.getvalue()


def _target(link: Path, root: Path) -> str:
    target = link.resolve()
    return os.path.relpath(target, link.parent.resolve()) if target.is_relative_to(root) else str(target)


def package_name(digest: str) -> str:
    """Name of a package in its run's storage."""
    return f"code-{digest}.tar"


def unpack(package: bytes, directory: Path) -> None:
    """Write a package's files into a directory."""
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        tar.extractall(directory, filter="tar")


def placed(job: JobSpec, run_dir: Location, caller: Caller = call_here) -> JobSpec:
    """The job with the directories of its own code on this node, which are made from run storage if they aren't there.
    They stay as long as this process lives. A job that was submitted without packages is unchanged.

    Raises:
        StorageError: a package is missing.
        OSError: run storage can't be read.
        UsageError: it isn't the one that was submitted.
        OrchestratorError: it can't be written here.
    """
    places = {old: str(unpacked(run_dir / package_name(digest), caller)) for old, digest in job.code.items()}
    return with_code_dirs(job, lambda directory: places.get(directory, directory))


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
            f"{package} is not the code that was submitted: its sha256 is another than in its name",
            remedy="Put the original back; to train with other code, submit a new run.",
        )
    return data


def _is_held(directory: Path) -> bool:
    """Whether the directory is there. It stays until this process ends, which holds a lock on it."""
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
