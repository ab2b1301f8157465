"""Files and directories that appear whole or not at all: written under a hidden name, flushed, then renamed.

A process that is killed leaves at most files of hidden names, which nothing reads.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` if the block succeeds: a reader sees the old content or the new."""
    with _written(path) as (file, partial):
        yield file
        _flush_file(file)
        partial.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text."""
    with replacing(path) as file:
        file.write(text.encode())


def create_atomically(path: Path, data: bytes, mode: int | None = None) -> None:
    """Create a file. Raises FileExistsError rather than overwrite.

    Args:
        mode: its permissions; None for those of any new file.
    """
    with _written(path) as (file, partial):
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data)
        _flush_file(file)
        os.link(partial, path)


@contextmanager
def new_directory(final: Path, partial: Path | None = None) -> Iterator[Path]:
    """A directory to fill; it becomes `final` if the block succeeds, and is removed if it fails. Files in it are for
    the caller to flush.

    Args:
        partial: path of the new directory, on the same file system. None for one beside `final`.

    Raises:
        OSError: it can't be written, or `final` exists and isn't empty.
    """
    partial = partial or _hidden(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush(partial)
        partial.rename(final)
        flush(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed


def make_folders(root: Path, folder: Path) -> None:
    """Make a folder at or below `root`, and those between, but not `root`: one that is made where a file system isn't
    mounted would take what belongs on that. Raises OSError if it isn't there."""
    missing = tuple(takewhile(lambda each: each != root, (folder, *folder.parents)))
    try:
        for each in reversed(missing):
            with suppress(FileExistsError):  # if it is a file, the write that follows fails
                each.mkdir()
        if missing or root.is_dir():
            return
    except FileNotFoundError:
        pass
    raise OSError(errno.ENODEV, "the directory is not there: perhaps its file system is not mounted", str(root))


def flush(path: Path) -> None:
    """Flush a file to disk, or the names in a directory where the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems refuse fsync of directories
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _written(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    partial = _hidden(path)
    try:
        with partial.open("xb") as file:
            yield file, partial
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _flush_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
