"""A shard's file in memory, from where another process can write it to storage."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.checkpoint.shard_file import ShardPiece, shard_chunks


@dataclass(frozen=True)
class ShardImage:
    """Content of a shard's file, in a file in memory.

    Args:
        path: of the memory, for processes of this node, while the process that made it lives.
        meta_sha256: of the state that is not a tensor, also where the file leaves it out.
    """

    path: str
    num_bytes: int
    header_sha256: str
    meta_sha256: str


class ShardMemory:
    """Memory that holds a shard's image until it is closed.

    Args:
        pieces: are copied; empty ones are left out.
        meta: JSON of the state that is not a tensor; equal on all ranks, so only rank 0 stores it.

    Raises:
        ValueError: an array's length or dtype doesn't fit.
        OSError, MemoryError: there is no memory for it; none stays in use.
    """

    def __init__(self, pieces: Sequence[ShardPiece], meta: str, rank: int) -> None:
        chunks = shard_chunks([piece for piece in pieces if piece.stop > piece.start], meta if rank == 0 else None)
        header = bytes(next(chunks))
        self._file = os.fdopen(os.memfd_create("shard"), "wb")
        try:
            self._file.write(header)
            for chunk in chunks:
                self._file.write(chunk)
            self._file.flush()
        except BaseException:
            with suppress(OSError):  # from flushing the rest: the descriptor is closed anyway
                self._file.close()
            raise
        self.image = ShardImage(
            path=f"/proc/{os.getpid()}/fd/{self._file.fileno()}",
            num_bytes=self._file.tell(),
            header_sha256=hashlib.sha256(header).hexdigest(),
            meta_sha256=hashlib.sha256(meta.encode()).hexdigest(),
        )

    def close(self) -> None:
        """Free the memory, once no other process reads it."""
        self._file.close()

    def __enter__(self) -> "ShardMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
