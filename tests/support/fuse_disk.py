"""A file system with faults of single calls, by FUSE. Needs root, /dev/fuse, libfuse 3 and mfusepy.

with fuse_disk(place, megabytes=16) as disk, disk.having(CallFault("fsync", Effect.ERROR)):
    ...
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.support.call_faults import CallFault
from tests.support.disk import skip_fault, small_disk

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


@dataclass(frozen=True)
class FuseDisk:
    """A file system that is mounted at `path`.

    Args:
        backing: directory that calls are passed on to; there nothing fails.
    """

    path: Path
    backing: Path
    server: "subprocess.Popen[str]"

    @contextmanager
    def having(self, *faults: CallFault) -> Iterator[None]:
        """Let these faults happen, and no others, while this lasts."""
        self._ask(faults)
        try:
            yield
        finally:
            self._ask(())

    def hits(self) -> int:
        """How many calls the faults of `having` have happened to, up to now."""
        return self._ask(None)

    def await_hits(self, number: int) -> None:
        """Wait until they have happened to so many calls."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := self.hits()) < number:
            assert time.monotonic() < deadline_s, f"faults have happened to {found} calls, not to {number}"
            time.sleep(0.01)

    def _ask(self, faults: tuple[CallFault, ...] | None) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        plain = None if faults is None else [asdict(fault) for fault in faults]
        print(json.dumps(plain), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


@contextmanager
def fuse_disk(place: Path, megabytes: int) -> Iterator[FuseDisk]:
    """A file system at `place` while this lasts, that passes calls on to a tmpfs of that size. Skips the test where it
    can't be mounted."""
    if lacking := _lacking():
        skip_fault(f"a file system by FUSE needs {lacking}")
    with small_disk(place.with_suffix(".backing"), megabytes) as backing:
        place.mkdir()
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fuse_server", backing, place],
            cwd=ROOT,
            env=os.environ | {"FUSE_LIBRARY_NAME": "fuse3"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None and server.stdout.readline(), "the file system could not be mounted"
            yield FuseDisk(place, backing, server)
        finally:
            server.kill()  # calls that hang in it fail
            server.wait()
            subprocess.run(["umount", "-l", place], check=True)


def drop_cache(folder: Path) -> None:
    """Let the next reads of the folder's files reach the file system."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _lacking() -> str:
    """What is missing here; empty if nothing is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "root and /dev/fuse"
    if find_library("fuse3") is None:
        return "libfuse 3: apt-get install libfuse3-4, on older systems libfuse3-3"
    return "" if find_spec("mfusepy") else "the package mfusepy, which is in the extra `test`"
