"""Files of shards in storage: ranges of their arrays, and digests of all of their bytes."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.block_digests import BlockDigests, digests_of
from orchestrator.errors import CheckpointCorrupt
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import LargeObjects

READ_BYTES = 16 * 2**20  # of an object at once
LEAST_HELD_BYTES, MOST_HELD_BYTES = 2**20, 2**26  # of one object, of all
_DTYPES = {"F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64", "U8": "uint8", "BOOL": "bool"}


def open_shard(checkpoint: Location, file: str, num_files: int) -> "StoredShard":
    """A file of a checkpoint. Raises as `StoredShard`.

    Args:
        num_files: that are open at once. Bytes of each one in a bucket are held, to answer the next reads.
    """
    if isinstance(checkpoint, Path):
        return _open_file(checkpoint / file)
    held_bytes = min(READ_BYTES, max(LEAST_HELD_BYTES, MOST_HELD_BYTES // num_files))
    return StoredShard(partial(objects_at(checkpoint).get, file), str(checkpoint / file), held_bytes)


def _open_file(path: Path) -> "StoredShard":
    """A file in a directory, which is open as long as the shard is held."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error}") from error
    num_bytes = os.fstat(file.fileno()).st_size

    def read(start: int, stop: int) -> bytes:
        return os.pread(file.fileno(), max(0, min(stop, num_bytes) - start), start)

    shard = StoredShard(read, str(path), 0)
    if num_bytes != shard.num_bytes:
        raise CheckpointCorrupt(f"{path} has {num_bytes} bytes, by its header {shard.num_bytes}")
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
    start, data = 0, objects.get(file, 0, READ_BYTES)
    while data:
        yield data
        start += len(data)
        data = objects.get(file, start, start + READ_BYTES)


@dataclass(frozen=True)
class _Array:
    """Place of an array in its file. `begin` is its first byte."""

    dtype: str
    shape: list[int]
    begin: int


class StoredShard:
    """A shard's file, whose arrays are read in parts. Its header is read first.

    Files are never mapped into memory: a page that can't be read would end the process, where a call raises OSError.

    Args:
        read: bytes of the file from a position to before another one, or to its end; perhaps fewer, if any.
        held_bytes: that are read at least, and held for the next reads, as arrays are mostly read in their order, and
            small.

    Attributes:
        num_bytes: of the file, by its header.

    Raises:
        CheckpointCorrupt: it is no such file.
        OSError: it can't be read.
    """

    def __init__(self, read: Callable[[int, int], bytes], where: str, held_bytes: int) -> None:
        self._read, self._where, self._held_bytes = read, where, held_bytes
        self._begin, self._held = 0, memoryview(b"")  # the bytes from `_begin`
        try:
            length = int.from_bytes(read(0, 8), "little")
            header = json.loads(read(8, 8 + length))
            header.pop("__metadata__", None)
            self._arrays = {
                key: _Array(_DTYPES[array["dtype"]], array["shape"], 8 + length + array["data_offsets"][0])
                for key, array in header.items()
            }
            self.num_bytes = 8 + length + max((array["data_offsets"][1] for array in header.values()), default=0)
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{where} can't be read: {error}") from error

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of an array of `length` elements. Raises CheckpointCorrupt or OSError."""
        array = self._arrays.get(key)
        if array is None or array.shape != [length]:
            raise CheckpointCorrupt(f"{self._where}: {key} has shape {array.shape if array else None}")
        size = np.dtype(array.dtype).itemsize
        found = np.empty(stop - start, dtype=array.dtype)
        view = found.view(np.uint8).data
        at, first = 0, array.begin + start * size
        while at < len(view):
            data = self._from(first + at, len(view) - at)
            if not data:
                raise CheckpointCorrupt(f"{self._where} ends within {key}")
            view[at : at + len(data)] = data
            at += len(data)
        return found

    def _from(self, start: int, most: int) -> memoryview:
        """Bytes from `start`, as many as are wanted at most; none at the file's end."""
        if not self._begin <= start < self._begin + len(self._held):
            self._begin, self._held = start, memoryview(self._read(start, start + (self._held_bytes or most)))
        return self._held[start - self._begin :][:most]
