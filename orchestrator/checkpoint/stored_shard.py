"""Files of shards in storage: ranges of their arrays, and digests of all of their bytes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from orchestrator.checkpoint.block_digests import BlockDigests, digests_of
from orchestrator.errors import CheckpointCorrupt
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.objects import LargeObjects

READ_BYTES = 16 * 2**20  # of an object at once
LEAST_HELD_BYTES, MOST_HELD_BYTES = 2**20, 2**26  # of one object, of all
_DTYPES = {"F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64", "U8": "uint8", "BOOL": "bool"}


class StoredShard(Protocol):
    """A shard's file, whose arrays are read in parts."""

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of an array of `length` elements. Raises CheckpointCorrupt."""
        ...


def open_shard(checkpoint: Location, file: str, num_files: int) -> StoredShard:
    """A file of a checkpoint. One in a directory is mapped into memory. Raises CheckpointCorrupt.

    Args:
        num_files: that are open at once. Bytes of each one in a bucket are held, to answer the next reads.
    """
    if isinstance(checkpoint, Path):
        return _MappedShard(checkpoint / file)
    held_bytes = min(READ_BYTES, max(LEAST_HELD_BYTES, MOST_HELD_BYTES // num_files))
    return _ShardObject(objects_at(checkpoint), file, str(checkpoint / file), held_bytes)


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


class _MappedShard:
    """A file in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointCorrupt(f"{path} can't be read: {error}") from error

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            stored = self._file.get_slice(key)  # type: ignore[no-untyped-call]
            if stored.get_shape() != [length]:
                raise CheckpointCorrupt(f"{self._path}: {key} has shape {stored.get_shape()}")
            found: npt.NDArray[Any] = stored[start:stop]
        except (SafetensorError, OSError) as error:
            raise CheckpointCorrupt(f"{self._path} can't be read: {error}") from error
        return found


@dataclass(frozen=True)
class _Array:
    """Place of an array in its file. `begin` is its first byte."""

    dtype: str
    shape: list[int]
    begin: int


class _ShardObject:
    """An object in a bucket, whose header is read first. A request reads on beyond what is wanted, as arrays are mostly
    read in their order, and small."""

    def __init__(self, objects: LargeObjects, file: str, where: str, held_bytes: int) -> None:
        self._objects, self._file, self._where, self._held_bytes = objects, file, where, held_bytes
        self._begin, self._held = 0, memoryview(b"")  # the bytes from `_begin`
        try:
            length = int.from_bytes(objects.get(file, 0, 8), "little")
            header = json.loads(objects.get(file, 8, 8 + length))
            self._arrays = {
                key: _Array(_DTYPES[array["dtype"]], array["shape"], 8 + length + array["data_offsets"][0])
                for key, array in header.items()
                if key != "__metadata__"
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CheckpointCorrupt(f"{where} can't be read: {error}") from error

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        array = self._arrays.get(key)
        if array is None or array.shape != [length]:
            raise CheckpointCorrupt(f"{self._where}: {key} has shape {array.shape if array else None}")
        size = np.dtype(array.dtype).itemsize
        found = np.empty(stop - start, dtype=array.dtype)
        view = found.view(np.uint8).data
        at, first = 0, array.begin + start * size
        while at < len(view):
            data = self._from(first + at)[: len(view) - at]
            if not data:
                raise CheckpointCorrupt(f"{self._where} ends within {key}")
            view[at : at + len(data)] = data
            at += len(data)
        return found

    def _from(self, start: int) -> memoryview:
        """Bytes from `start`, as many as are held; none at the object's end."""
        if not self._begin <= start < self._begin + len(self._held):
            data = self._objects.get(self._file, start, start + self._held_bytes)
            self._begin, self._held = start, memoryview(data)
        return self._held[start - self._begin :]
