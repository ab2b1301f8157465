"""File of a rank's shard: what it holds, its content in the safetensors format, and its header.

The format is eight bytes of header length, a JSON header and the raw little-endian arrays
(https://github.com/huggingface/safetensors#format). It is written here, not by the library, without a second copy of
the shard in memory. Among the header's texts are the digests of the blocks behind it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.checkpoint.block_digests import num_blocks
from orchestrator.checkpoint.manifest import DTYPES, ShardHeader, ShardPart, checkpoint_name
from orchestrator.errors import CheckpointCorrupt
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.storage.backends.location import Location, objects_at

_METADATA, _META, _BLOCKS = "__metadata__", "meta", "blocks"  # the format's key for texts, and ours among them
_DIGITS = 64  # of a digest


@dataclass(frozen=True)
class ShardPiece:
    """Elements [start, stop) of a flattened tensor, stored by this rank. `array` has stop - start elements."""

    tensor: str
    start: int
    stop: int
    array: npt.NDArray[Any]

    @property
    def key(self) -> str:
        return f"{self.tensor}[{self.start}:{self.stop}]"


def shard_chunks(pieces: Sequence[ShardPiece], meta: str | None) -> Iterator[bytes | memoryview]:
    """The content of the file: its header, then each array. In the header are zeros in place of the blocks' digests.
    Raises ValueError for an array that doesn't fit.

    Args:
        meta: JSON of the state that is not a tensor; None for none.
    """
    texts = {} if meta is None else {_META: meta}
    header: dict[str, object] = {_METADATA: texts}
    arrays: list[npt.NDArray[Any]] = []
    offset = 0
    for piece in pieces:
        array = np.ascontiguousarray(piece.array).reshape(-1)
        if array.size != piece.stop - piece.start or array.dtype.name not in DTYPES:
            raise ValueError(
                f"{piece.key} got {array.size} elements of {array.dtype}; "
                f"it needs {piece.stop - piece.start} of one of {', '.join(DTYPES)}"
            )
        if piece.key in header:
            raise ValueError(f"the range {piece.key} is named twice")
        header[piece.key] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": [array.size],
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        arrays.append(array)
    texts[_BLOCKS] = "0" * (_DIGITS * num_blocks(offset))
    yield _encoded(header)
    for array in arrays:
        yield array.view(np.uint8).data


def with_block_digests(header: bytes, digests: Sequence[str]) -> bytes:
    """A header of the same length with the digests of the blocks behind it."""
    fields = json.loads(header[8:])
    fields[_METADATA][_BLOCKS] = "".join(digests)
    return _encoded(fields)


def block_digests_in(header: Mapping[str, Any]) -> tuple[str, ...]:
    """The digests of the blocks behind a header. Raises LookupError for one without."""
    digits = header[_METADATA][_BLOCKS]
    return tuple(digits[at : at + _DIGITS] for at in range(0, len(digits), _DIGITS))


def arrays_in(header: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that a header describes, by their keys."""
    return {key: array for key, array in header.items() if key != _METADATA}


def _encoded(header: Mapping[str, object]) -> bytes:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # arrays start at a multiple of 8, aligned for readers that map the file
    return len(encoded).to_bytes(8, "little") + encoded


def read_shards(
    checkpoints: Location, shards: Sequence[ShardWritten], *, term: int
) -> list[tuple[ShardWritten, ShardHeader]]:
    """The shards that ranks wrote under `term`, that of their generation's plan, with the headers of their files.

    Raises:
        CheckpointCorrupt: a file is missing, or its header has changed since it was written.
        OSError: run storage can't be read.
    """
    return [
        (shard, _read_header(checkpoints / checkpoint_name(shard.step, term, shard.generation), shard))
        for shard in shards
    ]


def _read_header(checkpoint: Location, shard: ShardWritten) -> ShardHeader:
    path, objects = checkpoint / shard.file, objects_at(checkpoint)
    try:
        length = objects.get(shard.file, 0, 8)
        content = objects.get(shard.file, 8, 8 + min(int.from_bytes(length, "little"), shard.num_bytes))
    except FileNotFoundError as error:
        raise _corrupt(f"{path} has no file, its rank wrote {shard.num_bytes} bytes") from error
    if (found := hashlib.sha256(length + content).hexdigest()) != shard.header_sha256:
        raise _corrupt(f"{path} has a header with sha256 {found}, it was written with {shard.header_sha256}")
    header: Mapping[str, Any] = json.loads(content)
    meta = header.get(_METADATA, {}).get(_META)
    parts = tuple(_part_of(shard.file, key) for key in arrays_in(header))
    return ShardHeader(parts, None if meta is None else json.loads(meta))


def _part_of(file: str, key: str) -> tuple[str, ShardPart]:
    tensor, _, span = key.rpartition("[")
    start, stop = map(int, span.removesuffix("]").split(":"))
    return tensor, ShardPart(file, key, start, stop)


def _corrupt(fault: str) -> CheckpointCorrupt:
    return CheckpointCorrupt(fault, unchanged="No checkpoint was marked complete; the earlier ones stay.")
