"""Files of shards in storage, whose arrays are read in parts. Only bytes of verified blocks are returned."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint import block_digests
from orchestrator.checkpoint.block_digests import first_difference
from orchestrator.checkpoint.manifest import DTYPES, FileEntry
from orchestrator.checkpoint.shard_file import arrays_in, block_digests_in
from orchestrator.checkpoint.stored_bytes import Content, FileBytes, ObjectBytes, Span
from orchestrator.errors import CheckpointCorrupt
from orchestrator.storage.backends.location import Location

LIKELY_HEADER_BYTES = 2**18  # so that one read is enough for most headers
_DTYPES = {stored: name for name, stored in DTYPES.items()}


def open_shard(checkpoint: Location, file: str, entry: FileEntry, num_files: int = 1) -> "StoredShard":
    """A file of a checkpoint. Raises as `StoredShard`.

    Args:
        entry: the manifest's of this file.
        num_files: number of files open at once. Bytes of each one are held for later reads.
    """
    where = str(checkpoint / file)
    try:
        if isinstance(checkpoint, Path):
            return StoredShard(FileBytes(checkpoint / file, num_files), entry, where)
        return StoredShard(ObjectBytes(checkpoint, file, num_files), entry, where)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{where} can't be read: {error}") from error


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
    """A shard, whose header is read first. Each block that is read is compared with its digest from there.

    Args:
        entry: the manifest's of this file.

    Raises:
        CheckpointCorrupt: it isn't what was written.
        OSError: it can't be read.
    """

    def __init__(self, stored: FileBytes | ObjectBytes, entry: FileEntry, where: str) -> None:
        self._stored, self._where, self._num_bytes = stored, where, entry.num_bytes
        for read in (stored.read, stored.read_again):  # a bit may flip on its way here
            first = read(0, min(LIKELY_HEADER_BYTES, max(8, entry.num_bytes)))
            header_bytes = min(int.from_bytes(first[:8], "little"), entry.num_bytes)
            self._data = 8 + header_bytes  # the first byte behind the header
            rest = read(len(first), self._data) if self._data > len(first) else b""
            header = (first + rest)[: self._data]
            if (found := sha256(header).hexdigest()) == entry.header_sha256:
                break
        else:
            raise CheckpointCorrupt(f"{where}: header has sha256 {found}, it was written with {entry.header_sha256}")
        try:
            content = json.loads(header[8:])
            self._digests = block_digests_in(content)
            self._arrays = {
                key: _Array(_DTYPES[array["dtype"]], array["shape"], self._data + array["data_offsets"][0])
                for key, array in arrays_in(content).items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointCorrupt(f"{where} can't be read: {error}") from error
        self._begin, self._held = 0, memoryview(b"")  # verified bytes from `_begin` on

    def close(self) -> None:
        """Close the file, or drop the held bytes of the object. No reads afterwards."""
        self._held = memoryview(b"")
        self._stored.close()

    def verify(self) -> None:
        """Read all of it. Raises CheckpointCorrupt or OSError."""
        read_bytes = self._stored.read_bytes
        starts = range(self._data, self._num_bytes, read_bytes)
        for _ in self._read_spans([(start, min(start + read_bytes, self._num_bytes)) for start in starts]):
            pass

    def read(self, key: str, length: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements [start, stop) of an array of `length` elements. Raises CheckpointCorrupt or OSError."""
        array = self._array(key, length)
        found = np.empty(stop - start, dtype=array.dtype)
        view = found.view(np.uint8).data
        position = array.begin + start * array.item_bytes
        while len(view):
            if not self._begin <= position < self._begin + len(self._held):
                self._hold(position, position + len(view))
            part = self._held[position - self._begin :][: len(view)]
            view[: len(part)] = part
            view, position = view[len(part) :], position + len(part)
        return found

    def read_all(self, parts: Sequence[ArrayPart]) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        """Yield the elements of all parts in the order in which the file has them, with few reads, of each block once.

        Returns:
            (index of the part, its element that the values begin with, values); a large part comes in several. Values
            stay until the next ones are asked for.

        Raises:
            CheckpointCorrupt, OSError: as `read`.
        """
        runs: list[_Run] = []
        for piece in sorted((p for index, part in enumerate(parts) for p in self._pieces(index, part)), key=_first):
            start, stop = self._blocks_of(piece.first, piece.end)
            if runs and start <= runs[-1].stop and self._window(piece.first) == self._window(runs[-1].start):
                runs[-1].stop = max(stop, runs[-1].stop)
            else:
                runs.append(_Run(start, stop))
            runs[-1].pieces.append(piece)
        for run, content in zip(runs, self._read_spans([(run.start, run.stop) for run in runs]), strict=True):
            for piece in run.pieces:
                count = (piece.end - piece.first) // np.dtype(piece.dtype).itemsize
                values = np.frombuffer(content, piece.dtype, count, piece.first - run.start)
                usable = values.flags.aligned and values.flags.writeable
                yield piece.index, piece.element, values if usable else values.copy()

    def _hold(self, first: int, end: int) -> None:
        """Hold blocks from that of byte `first` on, up to that of `end` if they aren't too many."""
        begin, _ = self._blocks_of(first, first + 1)
        most = begin + self._stored.held_bytes
        span = self._blocks_of(first, most if self._stored.reads_ahead else min(end, most))
        self._begin, self._held = begin, memoryview(self._verified(span, self._stored.read(*span)))

    def _pieces(self, index: int, part: ArrayPart) -> Iterator["_Piece"]:
        """A part in pieces that each begin in another window."""
        array, start = self._array(part.key, part.length), part.start
        while start < part.stop:
            first = array.begin + start * array.item_bytes
            rest = self._stored.read_bytes - (first - self._data) % self._stored.read_bytes  # of the window
            stop = min(start - (-rest // array.item_bytes), part.stop)
            yield _Piece(index, start, array.dtype, first, array.begin + stop * array.item_bytes)
            start = stop

    def _window(self, position: int) -> int:
        """The number of what one read may have, in which this byte is."""
        return (position - self._data) // self._stored.read_bytes

    def _blocks_of(self, first: int, end: int) -> Span:
        """The whole blocks that hold these bytes."""
        block_bytes = block_digests.BLOCK_BYTES
        start = first - (first - self._data) % block_bytes
        return start, min(end + (self._data - end) % block_bytes, self._num_bytes)

    def _read_spans(self, spans: Sequence[Span]) -> Iterator[Content]:
        """The verified bytes of each span of whole blocks, in order."""
        for span, content in zip(spans, self._stored.read_spans(spans), strict=True):
            yield self._verified(span, content)

    def _verified(self, span: Span, content: Content) -> Content:
        """The content of whole blocks. What seems to be wrong is read again."""
        if self._fault(span, content):
            content = self._stored.read_again(*span)
            if fault := self._fault(span, content):
                raise CheckpointCorrupt(f"{self._where}: {fault}")
        return content

    def _fault(self, span: Span, content: Content) -> str:
        start, stop = span
        first, whole = (size // block_digests.BLOCK_BYTES for size in (start - self._data, len(content)))
        if len(content) != stop - start:
            return f"it ends within block {first + whole}"
        return first_difference(content, self._digests, first)

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


@dataclass
class _Run:
    """Blocks that are read at once, and the pieces in them."""

    start: int
    stop: int
    pieces: list[_Piece] = field(default_factory=list)


def _first(piece: _Piece) -> int:
    return piece.first
