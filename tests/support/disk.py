"""File systems that fill up or hang, which need root, and files that change places."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest

BLOCK = 64 * 1024
NO_SKIPS = "ORCHESTRATOR_TESTS_SKIP_NO_FAULTS"  # variable that CI sets where all that storage faults need is there
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


def skip_fault(why: str) -> NoReturn:
    """Skip a test of a storage fault, or fail it where none may be skipped."""
    if os.environ.get(NO_SKIPS):
        pytest.fail(f"{why}, and {NO_SKIPS} is set")
    pytest.skip(why)


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size at `place`, while this lasts. Skips the test where it can't be mounted."""
    place.mkdir()
    size = f"size={megabytes}m"
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", place]).returncode != 0:
        skip_fault("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def ext4_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """An ext4 of that size in a file, mounted at `place` while this lasts. Skips the test where it can't be mounted."""
    image = place.with_suffix(".img")
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    made = os.geteuid() == 0 and subprocess.run(["mkfs.ext4", "-q", image]).returncode == 0
    if not made or subprocess.run(["mount", "-o", "loop", image, place]).returncode != 0:
        skip_fault("mounting a file system needs root and a loop device")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def mounted(directory: Path, place: Path) -> Iterator[Path]:
    """The directory, mounted at `place` while this lasts. Skips the test where it can't be."""
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", directory, place]).returncode != 0:
        skip_fault("mounting a directory needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def unmounted(disk: Path) -> Iterator[None]:
    """Let an empty directory be in the place of `disk` while this lasts, as if it weren't mounted. What is written
    there is lost."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """Let all writes to the file system of `disk` hang while this lasts: their threads can't be killed."""
    subprocess.run(["fsfreeze", "--freeze", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)


def exchange(one: Path, other: Path) -> None:
    """Let each have the other's name, at once: in between neither name is free."""
    done = ctypes.CDLL(None, use_errno=True).renameat2(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE)
    if done != 0:
        raise OSError(number := ctypes.get_errno(), os.strerror(number), str(one))


def fill(disk: Path, leave: int = 0) -> Path:
    """Add to a file until nothing more fits, or only so many bytes are free. Returns it."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while shutil.disk_usage(disk).free > leave and file.write(bytes(BLOCK)) == BLOCK:
            pass
    return filler


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Let the file system of `disk` refuse changes while this lasts, but those to files that are open already: a mount
    that can only be read covers it, as one with open files can't be remounted."""
    subprocess.run(["mount", "--bind", "-o", "ro", disk, disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
