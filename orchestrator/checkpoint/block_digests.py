"""SHA-256 digests of a file's blocks: a part of a large file can be verified without the rest."""

import hashlib
import os
from itertools import zip_longest
from pathlib import Path

BLOCK_BYTES = 64 * 2**20
READ_BYTES = 2**20  # at once; divides a block


class BlockDigests:
    """Digests of bytes that are given in order, in pieces of any size."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes; a memoryview has items of one byte."""
        rest = memoryview(data)
        while len(rest):
            part, rest = rest[: self._room], rest[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._blocks.append(self._block.hexdigest())
                self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def all(self) -> tuple[str, ...]:
        """The digests of all blocks so far, of which the last one may be shorter than the others."""
        return (*self._blocks, *([self._block.hexdigest()] if self._room < BLOCK_BYTES else []))


def digests_of(path: Path) -> tuple[str, ...]:
    """The digests of a file's blocks."""
    digests, buffer = BlockDigests(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digests.update(memoryview(buffer)[:size])
    return digests.all()


def digests_on_device(path: Path) -> tuple[str, ...]:
    """The digests of a flushed file's blocks as the device holds them."""
    drop_cached(path)
    return digests_of(path)


def drop_cached(path: Path) -> None:
    """Drop a flushed file from the page cache, so that the next reads reach the device. File systems without one, like
    tmpfs, are read from memory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def first_difference(found: tuple[str, ...], written: tuple[str, ...]) -> str:
    """The first block with another digest than was written; empty if there is none."""
    for number, (is_now, was) in enumerate(zip_longest(found, written)):
        if is_now != was:
            return f"block {number} has sha256 {is_now}, it was written with {was}"
    return ""
