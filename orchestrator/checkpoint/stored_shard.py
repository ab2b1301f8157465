"""Files of shards in storage: ranges of their arrays, and digests of all of their bytes."""

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.block_digests import BlockDigests, digests_of
from orchestrator.checkpoint.manifest import DTYPES
from orchestrator.errors import CheckpointCorrupt
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import LargeObjects

READ_BYTES = 16 * 2**20  # of an object at once
LEAST_HELD_BYTES, MOST_HELD_BYTES = 2**20, 2**26  # of one object, of all
LARGEST_GAP_BYTES = 2**16  # between arrays that one request reads
REQUESTS_AT_ONCE = 4  # to a bucket
_DTYPES = {stored: name for name, stored in DTYPES.items()}


def open_shard(checkpoint: Location, file: str, num_files: int) -> "StoredShard":
    """A file of a checkpoint. Raises as `StoredShard`.

    Args:
        num_files: number of files open at once. Bytes of each one in a bucket are held for later reads.
    """
    where = str(checkpoint / file)
    if not isinstance(checkpoint, Path):
        held_bytes = min(READ_BYTES, max(LEAST_HELD_BYTES, MOST_HELD_BYTES // num_files))
        return StoredShard(_Object(objects_at(checkpoint), file, held_bytes), where)
    try:
        opened = _File(checkpoint / file)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{where} can't be read: {error}") from error
    shard = StoredShard(opened, where)
    if opened.num_bytes != shard.num_bytes:
        raise CheckpointCorrupt(f"{where} has {opened.num_bytes} bytes, by its header {shard.num_bytes}")
    return shard


def stored_digests(checkpoint: Location, file: str) -> tuple[str, ...]:
    """The digests of a file's blocks. Raises OSError."""
    if isinstance(checkpoint, Path):
        return digests_of(checkpoint / file)
    digests = BlockDigests()
    for data in _contents(objects_at(checkpoint), file):
        digests.update(data)
    return digests.all()


def _contents(objects: LargeObjects, file: str) -> Iterator[bytes]:
    """An object's bytes in parts. The next one is requested while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="object") as pool:
        start, request = 0, pool.submit(objects.get, file, 0, READ_BYTES)
        while data := request.result():
            start += len(data)
            request = pool.submit(objects.get, file, start, start + READ_BYTES)
            yield data


class _File:
    """A file in a directory, open as long as this is held. It is not mapped into memory: a page that can't be read
    would end the process, where a call raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.num_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), max(0, min(stop, self.num_bytes) - start), start)

    def fill(self, start: int, buffer: memoryview) -> int:
        return os.preadv(self._file.fileno(), [buffer], start)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each span (start, stop), in order."""
        return (self.read(start, stop) for start, stop in spans)

    def close(self) -> None:
        self._file.close()


class _Object:
    """An object in a bucket. A request reads beyond the requested range, as most arrays are small and read in order."""

    def __init__(self, objects: LargeObjects, file: str, held_bytes: int) -> None:
        self._objects, self._file, self._held_bytes = objects, file, held_bytes
        self._begin, self._held = 0, memoryview(b"")  # the bytes from `_begin`

    def read(self, start: int, stop: int) -> bytes:
        return self._objects.get(self._file, start, stop)

    def fill(self, start: int, buffer: memoryview) -> int:
        if not self._begin <= start < self._begin + len(self._held):
            self._begin, self._held = start, memoryview(self.read(start, start + self._held_bytes))
        found = self._held[start - self._begin :][: len(buffer)]
        buffer[: len(found)] = found
        return len(found)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each span (start, stop), in order. The next ones are requested meanwhile."""
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
        self._held = memoryview(b"")


@dataclass(frozen=True)
class _Array:
    """Place of an array in its file. `begin` is its first byte."""

    dtype: str
    shape: list[int]
    begin: int

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class ArrayPart:
    """Elements [start, stop) of an array of `length` elements."""

    key: str
    length: int
    start: int
    stop: int


class StoredShard:
    """A shard, whose arrays are read in parts. Its header is read first.

    Args:
        stored: `read` gives its bytes from a position to before another one, or to its end; `fill` puts those from a
            position into a buffer, as many as are at hand, and returns their number: 0 at the end.

    Attributes:
        num_bytes: by the header.

    Raises:
        CheckpointCorrupt: it is no shard.
        OSError: it can't be read.
    """

    def __init__(self, stored: _File | _Object, where: str) -> None:
        self._stored, self._where = stored, where
        try:
            length = int.from_bytes(stored.read(0, 8), "little")
            header = json.loads(stored.read(8, 8 + length))
            header.pop("__metadata__", None)
            self._arrays = {
                key: _Array(_DTYPES[array["dtype"]], array["shape"], 8 + length + array["data_offsets"][0])
                for key, array in header.items()
            }
            self.num_bytes = 8 + length + max((array["data_offsets"][1] for array in header.values()), default=0)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{where} can't be read: {error}") from error

    def close(self) -> None:
        """Close the file, or drop the held bytes of the object. No reads afterwards."""
        self._stored.close()

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of an array of `length` elements. Raises CheckpointCorrupt or OSError."""
        array = self._array(key, length)
        found = np.empty(stop - start, dtype=array.dtype)
        view = found.view(np.uint8).data
        at, first = 0, array.begin + start * array.item_bytes
        while at < len(view):
            num_bytes = self._stored.fill(first + at, view[at:])
            if num_bytes == 0:
                raise CheckpointCorrupt(f"{self._where} ends within {key}")
            at += num_bytes
        return found

    def read_all(self, parts: Sequence[ArrayPart]) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield the elements of all parts in the order in which the file has them, with as few reads as possible.

        Returns:
            (index of the part, its element that the values begin with, values); a large part comes in several.

        Raises:
            CheckpointCorrupt, OSError: as `read`.
        """
        pieces = sorted((piece for index, part in enumerate(parts) for piece in self._pieces(index, part)), key=_first)
        runs: list[list[_Piece]] = []
        for piece in pieces:
            if (
                runs
                and piece.first <= runs[-1][-1].end + LARGEST_GAP_BYTES
                and piece.end - runs[-1][0].first <= READ_BYTES
            ):
                runs[-1].append(piece)
            else:
                runs.append([piece])
        spans = [(run[0].first, max(piece.end for piece in run)) for run in runs]
        for run, (start, stop), content in zip(runs, spans, self._stored.read_spans(spans), strict=True):
            if len(content) != stop - start:
                raise CheckpointCorrupt(f"{self._where} ends within {parts[run[-1].index].key}")
            for piece in run:
                count = (piece.end - piece.first) // np.dtype(piece.dtype).itemsize
                values = np.frombuffer(content, piece.dtype, count, piece.first - start)
                yield piece.index, piece.element, values.copy()  # aligned, and writable

    def _pieces(self, index: int, part: ArrayPart) -> Iterator["_Piece"]:
        """A part in pieces that one read may have."""
        array = self._array(part.key, part.length)
        most = READ_BYTES // array.item_bytes
        for start in range(part.start, part.stop, most):
            stop = min(start + most, part.stop)
            first, end = (array.begin + element * array.item_bytes for element in (start, stop))
            yield _Piece(index, start, array.dtype, first, end)

    def _array(self, key: str, length: int) -> _Array:
        array = self._arrays.get(key)
        if array is None or array.shape != [length]:
            raise CheckpointCorrupt(f"{self._where}: {key} has shape {array.shape if array else None}")
        return array


@dataclass(frozen=True)
class _Piece:
    """Bytes [first, end) of a file: those of a part from `element` on."""

    index: int
    element: int
    dtype: str
    first: int
    end: int


def _first(piece: _Piece) -> int:
    return piece.first
