"""SHA-256 digests of blocks: a part of a large file can be verified without the rest."""

import os
from hashlib import sha256
from pathlib import Path

BLOCK_BYTES = 2**18


def num_blocks(num_bytes: int) -> int:
    """The number of blocks of so many bytes, of which the last one may be shorter than the others."""
    return -(-num_bytes // BLOCK_BYTES)


def digests_of(path: Path, start: int) -> tuple[str, ...]:
    """The digests of the blocks of a file's bytes from `start` on."""
    digests, buffer = list[str](), bytearray(BLOCK_BYTES)
    with path.open("rb") as file:
        file.seek(start)
        while size := file.readinto(buffer):
            digests.append(sha256(memoryview(buffer)[:size]).hexdigest())
    return tuple(digests)


def first_difference(content: bytes | memoryview, digests: tuple[str, ...], first: int) -> str:
    """The first block of `content` with another digest than was written; empty if there is none.

    Args:
        first: number of the block that the content begins with.
    """
    for number, start in enumerate(range(0, len(content), BLOCK_BYTES), first):
        found = sha256(memoryview(content)[start : start + BLOCK_BYTES]).hexdigest()
        if found != digests[number]:
            return f"block {number} has sha256 {found}, it was written with {digests[number]}"
    return ""


def drop_cached(path: Path) -> None:
    """Drop a flushed file from the page cache, so that the next reads reach the device. File systems without one, like
    tmpfs, are read from memory. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
