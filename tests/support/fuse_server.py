"""A file system that passes all calls on to a directory, but for the faults that are armed.

    python -m tests.support.fuse_server BACKING PLACE

It prints `0` once it is mounted. Each line of its input is a list of faults to arm, as JSON, or `null`; it answers with
the number of calls that those armed before have happened to. It ends with the thread that started it: calls that hang
in it fail then, so that a process with a thread in one can end.
"""

import ctypes
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mfusepy import FUSE, Operations

from tests.support.call_faults import ArmedFaults, CallFault

PR_SET_PDEATHSIG, MNT_DETACH = 1, 2
AUTO_INVAL_DATA = 1 << 12  # of libfuse: files whose times have changed lose their page cache
UTIME_NOW = (1 << 30) - 1  # in place of nanoseconds
PARENT_ENDED = signal.SIGUSR1
SPACE = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize", "f_namemax")
ATTRIBUTES = ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
TIMES = ("st_atime", "st_mtime", "st_ctime")


def faulty(method: Callable[..., Any]) -> Callable[..., Any]:
    """An operation that faults may happen to. Its first argument is a path, or None if its last one is an open file."""

    @functools.wraps(method)
    def operation(self: "PassingOn", path: str | None, *args: Any) -> Any:
        named = self.open_paths[args[-1]] if path is None else path
        return self.faults.make(method.__name__, named, functools.partial(method, self, path), *args)

    return operation


class PassingOn(Operations):
    """Operations on the files of a directory; open ones are known by their descriptors in this process."""

    use_ns = True
    flag_nullpath_ok = flag_nopath = True  # a file that is deleted while it is open has no path

    def __init__(self, backing: str, faults: ArmedFaults) -> None:
        self._backing, self.faults = backing, faults
        self.open_paths: dict[int, str] = {}

    def init_with_config(self, connection: Any, config: Any) -> None:
        connection.want &= ~AUTO_INVAL_DATA
        print(0, flush=True)  # it is mounted

    @faulty
    def getattr(self, path: str | None, file: int | None = None) -> dict[str, int]:
        found = os.fstat(file) if file is not None else os.lstat(self._at(path))
        times = {name: getattr(found, f"{name}_ns") for name in TIMES}
        return times | {name: getattr(found, name) for name in ATTRIBUTES}

    @faulty
    def opendir(self, path: str) -> int:
        return self._opened(path, os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY))

    @faulty
    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    @faulty
    def utimens(self, path: str, times: tuple[int, int]) -> None:
        accessed, modified = (time.time_ns() if ns == UTIME_NOW else ns for ns in times)
        os.utime(self._at(path), ns=(accessed, modified))

    @faulty
    def readdir(self, path: str | None, directory: int) -> list[str]:
        return [".", "..", *os.listdir(directory)]

    @faulty
    def fsyncdir(self, path: str | None, only_data: int, directory: int) -> None:
        os.fsync(directory)

    @faulty
    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in SPACE}

    @faulty
    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    @faulty
    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    @faulty
    def link(self, path: str, existing: str) -> None:
        os.link(self._at(existing), self._at(path))

    @faulty
    def symlink(self, path: str, content: str) -> None:
        os.symlink(content, self._at(path))

    @faulty
    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    @faulty
    def rename(self, path: str, new: str) -> None:
        os.rename(self._at(path), self._at(new))

    @faulty
    def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    @faulty
    def create(self, path: str, mode: int, flags: int) -> int:
        return self._opened(path, os.open(self._at(path), flags | os.O_CREAT, mode))

    @faulty
    def open(self, path: str, flags: int) -> int:
        return self._opened(path, os.open(self._at(path), flags))

    @faulty
    def read(self, path: str | None, size: int, offset: int, file: int) -> bytes:
        return os.pread(file, size, offset)

    @faulty
    def write(self, path: str | None, data: bytes, offset: int, file: int) -> int:
        return os.pwrite(file, data, offset)

    @faulty
    def truncate(self, path: str | None, length: int, file: int | None = None) -> None:
        os.truncate(self._at(path) if file is None else file, length)

    @faulty
    def fsync(self, path: str | None, only_data: int, file: int) -> None:
        os.fsync(file)

    def release(self, path: str | None, file: int) -> None:
        del self.open_paths[file]
        os.close(file)

    releasedir = release

    def _at(self, path: str) -> str:
        return self._backing + path

    def _opened(self, path: str, file: int) -> int:
        self.open_paths[file] = path
        return file


def obey(faults: ArmedFaults) -> None:
    """Arm the faults that the input names."""
    for line in sys.stdin:
        hits = faults.hits
        if (asked := json.loads(line)) is not None:
            faults.arm([CallFault(**fault) for fault in asked])
        print(hits, flush=True)  # only now, as its reader relies on the faults


def end_with_parent(place: str) -> None:
    """Unmount, and end this process, once the thread that started it has ended. Its input may stay open for longer: a
    thread that hangs here keeps its process."""
    signal.sigwait({PARENT_ENDED})
    ctypes.CDLL(None).umount2(place.encode(), MNT_DETACH)
    os._exit(0)


def main() -> None:
    backing, place = sys.argv[1:]
    os.umask(0)  # the kernel has applied that of the process which makes the call
    signal.pthread_sigmask(signal.SIG_BLOCK, {PARENT_ENDED})
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, PARENT_ENDED)
    faults = ArmedFaults()
    threading.Thread(target=obey, args=(faults,), daemon=True).start()
    threading.Thread(target=end_with_parent, args=(place,), daemon=True).start()
    # As a local disk has them: files keep their page cache, a link has the inode of its file, and a file that is open
    # may be deleted.
    FUSE(PassingOn(backing, faults), place, foreground=True, kernel_cache=True, use_ino=True, hard_remove=True)


if __name__ == "__main__":
    main()
