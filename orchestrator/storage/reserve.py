"""Disk space that a run keeps in reserve and gives up when the file system is full, so that its journal goes on."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

RESERVE_BYTES = 4 * 2**20  # about 1,000 entries of a journal, each a file
TAKE_AGAIN_S = 5.0
ROOM = 4  # reserves that must be free before one is taken again: the run's checkpoints come first
FULL = (errno.ENOSPC, errno.EDQUOT)


def reserve_in(directory: Path) -> Path:
    """The file that holds the reserve of a run's directory."""
    return directory / ".reserve"


class SpaceReserve:
    """A hidden file of `RESERVE_BYTES` in `directory`. None is made where the file system is nearly full."""

    def __init__(self, directory: Path) -> None:
        self._file = reserve_in(directory)
        self._looked_s = -TAKE_AGAIN_S
        self.is_taken = self._file.exists()  # by an earlier controller of the run

    def tend(self) -> None:
        """Reserve the space again once there is room, which is looked for every few seconds."""
        now_s = time.monotonic()
        if self.is_taken or now_s - self._looked_s < TAKE_AGAIN_S:
            return
        self._looked_s = now_s
        try:
            space = os.statvfs(self._file.parent)
            if space.f_bavail * space.f_frsize >= ROOM * RESERVE_BYTES:
                with self._file.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
                self.is_taken = True
        except OSError:
            self.give_up()

    def give_up(self) -> bool:
        """Free the space. Returns whether there was any."""
        self.is_taken = False
        with suppress(OSError):
            self._file.unlink()
            return True
        return False
