"""Tar files of directories with a user's code, without run storage, environments and caches."""

import io
import os
import tarfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.storage.backends.home import home
from orchestrator.storage.backends.location import Location

LEFT_OUT = [".git", ".venv", "venv", "runs", "mlruns", "__pycache__", "*.pyc", ".*_cache", "node_modules"]
MOST_BYTES = 100 << 20
UNCHANGED = "Nothing was started."


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


def unpack(package: bytes, directory: Path) -> None:
    """Write a package's files into a directory."""
    with tarfile.open(fileobj=io.BytesIO(package)) as tar:
        tar.extractall(directory, filter="tar")
