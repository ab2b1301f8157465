"""Packages of submitted jobs, in run storage: each a directory that all nodes see, kept while a run refers to it.

STORAGE/.packages/ID/     a copy of the directory that was sent
"""

import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.code_archive import LEFT_OUT, contents
from orchestrator.errors import UsageError

PACKAGES = ".packages"
YOUNG_S = 3600.0  # a submission takes minutes at most: younger packages may belong to an open one


def check(directory: Path) -> None:
    """Raise UsageError if the directory is too large, or links lead out of it: Ray sends what links lead to."""
    for path in contents(directory):
        _check_link(path, directory)


def _check_link(path: Path, directory: Path) -> None:
    if not path.is_symlink():
        return
    target = path.resolve()
    if not target.is_relative_to(directory.resolve()):
        wrong = f"leads out of it, to {target}"
    elif target.is_dir():
        wrong = f"leads to a directory, {target}"
    elif not target.exists():
        wrong = "leads nowhere"
    else:
        return
    raise UsageError(
        f"{directory} can't be sent to the cluster: the link {path.relative_to(directory)} {wrong}",
        remedy="Put a copy in its place, or remove it.",
        unchanged="Nothing was started.",
    )


@dataclass(frozen=True)
class Package:
    """A copy in run storage. `is_first` if the storage was created for it."""

    path: Path
    is_first: bool

    def discard(self) -> None:
        """Remove the copy, and directories that were created for it alone."""
        shutil.rmtree(self.path, ignore_errors=True)
        above = [self.path.parent, *([self.path.parent.parent] if self.is_first else [])]
        with suppress(OSError):  # they hold other packages by now
            for directory in above:
                directory.rmdir()


def keep(directory: Path, storage: Path) -> Package:
    """Copy a job's directory to run storage. Raises UsageError if that can't be written."""
    package = Package(storage / PACKAGES / uuid.uuid4().hex, not storage.exists())
    try:
        shutil.copytree(directory, package.path, ignore=shutil.ignore_patterns(*LEFT_OUT))
        os.utime(package.path)  # its age counts from now
    except OSError as error:
        package.discard()
        raise UsageError(
            f"storage {storage} can't be written in the cluster: {error.strerror or error}",
            remedy="Name a directory that all its nodes share and may write.",
            unchanged="Nothing was started.",
        ) from error
    return package


def sweep(storage: Path, now: float | None = None) -> list[Path]:
    """Remove old packages that no run in the storage refers to. Returns the removed ones.

    Args:
        now: `time.time()` seconds.
    """
    old = (time.time() if now is None else now) - YOUNG_S
    packages = [path for path in (storage / PACKAGES).glob("*") if path.is_dir() and path.stat().st_mtime < old]
    if not packages:
        return []
    jobs = [path.read_text(encoding="utf-8") for path in storage.glob("*/job.json")]
    unused = [package for package in packages if not any(package.name in job for job in jobs)]
    for package in unused:
        shutil.rmtree(package, ignore_errors=True)
    return unused
