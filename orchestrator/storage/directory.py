"""Objects in a directory of a file system, local or shared.

An object is written to a hidden file of its own, flushed, and linked to its name: `link` fails if the name is taken, on
network file systems too, which `O_EXCL` followed by a write can't give (a reader would see part of the object).
"""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from orchestrator.errors import StorageError

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_DIRECTORY_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # some network file systems refuse fsync of directories


class DirectoryObjects:
    """Objects below `root`, which need not exist yet. Hidden files are not objects."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, key: str, data: bytes) -> bytes:
        path = self._root / key
        try:
            self._link(path, data)
        except FileExistsError:
            return path.read_bytes()
        except OSError:  # it may be there all the same: the reply to `link` was lost, or the directory wasn't flushed
            with suppress(FileNotFoundError):
                found = path.read_bytes()
                flush_directory(path.parent)
                return found
            raise
        return data

    def _link(self, path: Path, data: bytes) -> None:
        """Write a hidden file and link it to its name. Raises FileExistsError if the name is taken."""
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            with hidden.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(hidden, path)
            except FileExistsError:
                if path.read_bytes() != data:  # equal: an earlier attempt, whose reply was lost
                    raise
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise StorageError(
                        f"{path.parent} is on a file system without hard links ({error.strerror}): it can't create a "
                        "file only if its name is free",
                        remedy="Name run storage on another file system.",
                        unchanged="Nothing was written.",
                    ) from error
                raise
        finally:
            with suppress(OSError):
                hidden.unlink(missing_ok=True)
        flush_directory(path.parent)

    def get(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def names(self, folder: str) -> tuple[str, ...]:
        try:
            with os.scandir(self._root / folder) as entries:
                return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".")))
        except FileNotFoundError:
            return ()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)


def flush_directory(path: Path) -> None:
    """Make new and removed names in `path` durable, where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FLUSH:
            raise
    finally:
        os.close(descriptor)
