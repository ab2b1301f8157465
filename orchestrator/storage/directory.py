"""Objects in a directory of a file system, local or shared.

An object is written to a hidden file of its own, flushed, and linked to its name: `link` fails if the name is taken, on
network file systems too, which `O_EXCL` followed by a write can't give (a reader would see part of the object).
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.storage.atomic import create_atomically, flush, make_folders, replacing
from orchestrator.storage.objects import StoredObject, Written

COPIED_BYTES = 2**20  # at once
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class DirectoryObjects:
    """Objects below `root`, which must be there when one is created. Hidden files are not objects."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, key: str, data: bytes) -> bytes:
        path = self._root / key
        try:
            make_folders(self._root, path.parent)
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
            with suppress(FileNotFoundError):  # it may exist: a reply was lost, or the directory wasn't flushed
                found = path.read_bytes()
                flush(path.parent)
                return found
            raise
        return data

    def put(self, key: str, file: Path) -> Written:
        path, digest, num_bytes = self._root / key, sha256(), 0
        make_folders(self._root, path.parent)
        with file.open("rb") as source, replacing(path) as target:
            while data := source.read(COPIED_BYTES):
                digest.update(data)
                num_bytes += target.write(data)
        return Written(digest.hexdigest(), num_bytes)

    def get(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with (self._root / key).open("rb") as file:
            if start:
                file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def names(self, folder: str) -> tuple[str, ...]:
        try:
            with os.scandir(self._root / folder) as entries:
                return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".")))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def objects(self, folder: str) -> tuple[StoredObject, ...]:
        return tuple(sorted(self._walk(folder)))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (self._root / key).unlink(missing_ok=True)

    def _walk(self, folder: str) -> Iterator[StoredObject]:
        for directory, folders, names in os.walk(self._root / folder, onerror=_raise_unless_absent):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(directory, name)
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if not name.startswith("."):
                        found = path.stat()
                        yield StoredObject(path.relative_to(self._root).as_posix(), found.st_size, found.st_mtime)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
