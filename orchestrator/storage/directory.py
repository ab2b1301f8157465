"""Objects in a directory of a file system, local or shared.

An object is written to a hidden file of its own, flushed, and linked to its name: `link` fails if the name is taken, on
network file systems too, which `O_EXCL` followed by a write can't give (a reader would see part of the object).
"""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.storage.atomic import create_atomically, flush

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class DirectoryObjects:
    """Objects below `root`, which need not exist yet. Hidden files are not objects."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, key: str, data: bytes) -> bytes:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            create_atomically(path, data)
        except FileExistsError:
            flush(path.parent)
            return path.read_bytes()
        except OSError as error:
            if error.filename2 is not None and error.errno in _NO_HARD_LINKS:
                raise UsageError(
                    f"{path.parent} is on a file system without hard links ({error.strerror}): it can't create a file "
                    "only if its name is free",
                    remedy="Name run storage on another file system.",
                    unchanged="Nothing was written.",
                ) from error
            with suppress(FileNotFoundError):  # there all the same: a reply was lost, or the directory wasn't flushed
                found = path.read_bytes()
                flush(path.parent)
                return found
            raise
        return data

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
