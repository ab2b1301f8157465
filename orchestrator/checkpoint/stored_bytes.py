"""Bytes of a shard's file, in a directory or a bucket.

Both kinds have `read_bytes`, some blocks, which one read should have at most; `held_bytes`, which may be held of each
file to answer the next reads; and whether so many are worth reading where fewer are needed (`reads_ahead`).
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from orchestrator.storage.backends.location import Location, objects_at

LEAST_HELD_BYTES, MOST_HELD_BYTES = 2**20, 2**26  # of one file, of all
REQUESTS_AT_ONCE = 4  # to a bucket

Span = tuple[int, int]  # bytes [start, stop) of a file
Content = bytes | memoryview


class FileBytes:
    """A file in a directory, open as long as this is held. It is not mapped into memory: a page that can't be read
    would end the process, where a call raises OSError."""

    read_bytes, reads_ahead = 2**20, False

    def __init__(self, path: Path, num_files: int) -> None:
        self._file = path.open("rb", buffering=0)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # the kernel reads further ahead
        self.held_bytes = _held_bytes(self.read_bytes, num_files)

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)

    def read_again(self, start: int, stop: int) -> bytes:
        """The same from the device, not from memory."""
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.read(start, stop)

    def read_spans(self, spans: Sequence[Span]) -> Iterator[Content]:
        """The bytes of each span, in order. They stay until the next ones are read, to the same memory: it costs more
        to get new pages each time than to read."""
        buffer = memoryview(bytearray(max((stop - start for start, stop in spans), default=0)))
        for start, stop in spans:
            yield buffer[: os.preadv(self._file.fileno(), [buffer[: stop - start]], start)]

    def close(self) -> None:
        self._file.close()


class ObjectBytes:
    """An object in a bucket. A request reads on beyond what is wanted, as arrays are mostly read in their order, and
    small."""

    read_bytes, reads_ahead = 16 * 2**20, True

    def __init__(self, checkpoint: Location, file: str, num_files: int) -> None:
        self._objects, self._file = objects_at(checkpoint), file
        self.held_bytes = _held_bytes(self.read_bytes, num_files)

    def read(self, start: int, stop: int) -> bytes:
        return self._objects.get(self._file, start, stop)

    read_again = read

    def read_spans(self, spans: Sequence[Span]) -> Iterator[Content]:
        """The bytes of each span, in order. The next ones are requested meanwhile."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="object") as pool:
            requests: deque[Future[bytes]] = deque()
            try:
                for start, stop in spans:
                    requests.append(pool.submit(self.read, start, stop))
                    if len(requests) == REQUESTS_AT_ONCE:
                        yield requests.popleft().result()
                while requests:
                    yield requests.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        pass


def _held_bytes(read_bytes: int, num_files: int) -> int:
    """Bytes that are held of each of so many files."""
    return min(read_bytes, max(LEAST_HELD_BYTES, MOST_HELD_BYTES // num_files))
