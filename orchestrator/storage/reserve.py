"""Disk space that a run keeps in reserve and gives up when the file system is full, so that its journal goes on."""

import errno
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.storage.caller import Caller, call_here

RESERVE_BYTES = 4 * 2**20  # about 1,000 entries of a journal, each a file
TAKE_AGAIN_S = 5.0
ROOM = 4  # reserves that must be free before one is taken again: the run's checkpoints come first
FULL = (errno.ENOSPC, errno.EDQUOT)


def reserve_in(directory: Path) -> Path:
    """The file that holds the reserve of a run's directory."""
    return directory / ".reserve"


class SpaceReserve:
    """A hidden file of `RESERVE_BYTES` in `directory`. None is made where the file system is nearly full. Methods may
    be called from any thread.

    Args:
        caller: makes the calls to the file system.
    """

    def __init__(self, directory: Path, caller: Caller = call_here) -> None:
        self._file, self._caller = reserve_in(directory), caller
        self._looked_s = -TAKE_AGAIN_S
        self._lock = threading.RLock()
        self.is_taken = caller(self._file.exists)  # by an earlier controller of the run

    def tend(self) -> None:
        """Reserve the space again once there is room, which is looked for every few seconds."""
        now_s = time.monotonic()
        with self._lock:
            if self.is_taken or now_s - self._looked_s < TAKE_AGAIN_S:
                return
            self._looked_s = now_s
            try:
                self.is_taken = self._caller(_take, self._file)
            except OSError:
                self.give_up()

    def give_up(self) -> bool:
        """Free the space. Returns whether there was any."""
        with self._lock:
            self.is_taken = False
            with suppress(OSError):
                self._caller(self._file.unlink)
                return True
        return False


class NoReserve:
    """That of storage without a file system to reserve space in."""

    def tend(self) -> None:
        """Nothing to reserve."""

    def give_up(self) -> bool:
        """Nothing to free."""
        return False


Reserve = SpaceReserve | NoReserve


def has_room(directory: Path) -> bool:
    """Whether as much is free as must be before a reserve is taken. Raises OSError."""
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize >= ROOM * RESERVE_BYTES


def _take(file: Path) -> bool:
    """Make the file if there is room for it. Returns whether there was."""
    if not has_room(file.parent):
        return False
    with file.open("wb") as reserve:
        os.posix_fallocate(reserve.fileno(), 0, RESERVE_BYTES)
    return True
