"""A shard's file in memory, from where another process can write it to storage."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from orchestrator.checkpoint.block_digests import digests_of
from orchestrator.checkpoint.shard_file import ShardPiece, shard_chunks, with_block_digests


@dataclass(frozen=True)
class ShardImage:
    """Content of a shard's file, in a file in memory.

    Args:
        path: of the memory, for processes of this node, while the process that made it lives.
        meta_sha256: of the state that is not a tensor, also where the file leaves it out.
    """

    path: str
    num_bytes: int
    header_bytes: int
    meta_sha256: str

    def digest(self) -> str:
        """Put the digests of its blocks into its header; may be repeated. Returns the digest of the header.

        Called by the process that writes it, as it takes processor time. Raises OSError if the memory is gone.
        """
        digests = digests_of(Path(self.path), self.header_bytes)
        with Path(self.path).open("r+b") as memory:
            header = with_block_digests(memory.read(self.header_bytes), digests)
            memory.seek(0)
            memory.write(header)
        return sha256(header).hexdigest()


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
            header_bytes=len(header),
            meta_sha256=sha256(meta.encode()).hexdigest(),
        )

    def close(self) -> None:
        """Free the memory, once no other process reads it."""
        self._file.close()

    def __enter__(self) -> "ShardMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
