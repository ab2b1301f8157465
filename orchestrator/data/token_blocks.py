"""Tokens of a split in a bucket, of which a node keeps the blocks that its processes have read, in a sparse file.

A block is there if its bytes in the file have its digest, which each read finds out anew, in some 0.2 ms a block. That
is all the bookkeeping there is: no record of blocks could be wrong. A write that a kill or a crash of the node has cut
off, and bytes that the disk lost or that have changed meanwhile, are blocks that aren't there, and are fetched.
Processes only ever write verified bytes, so it doesn't matter if two write the same block.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import BLOCK_BYTES, DIGEST_BYTES
from orchestrator.errors import StoreCorrupt
from orchestrator.sampling.chunks import Ints
from orchestrator.storage.objects import LargeObjects

log = logging.getLogger("orchestrator.data")

REQUESTS_AT_ONCE = 8  # for blocks that a reader waits for
REQUESTS_AHEAD = 4  # for blocks of later reads
BLOCKS_AT_ONCE = 16  # of one request, for blocks in sequence
OTHER_S, LOOK_S = 5.0, 0.01  # longest wait for blocks that another process fetches: it may be stopped; between looks

Bytes = bytes | memoryview


class TokenBlocks:
    """Implements `split_tokens.Tokens`. Safe from any thread.

    Args:
        objects: where the tokens file is.
        key: its name there.
        where: its location, for messages.
        cache: the sparse file, which need not exist.
        num_bytes: of the tokens file.
        digests: of its blocks, back to back.
        dtype: of a token.
    """

    def __init__(
        self,
        objects: LargeObjects,
        key: str,
        where: str,
        cache: Path,
        num_bytes: int,
        digests: NDArray[np.uint8],
        dtype: str,
    ) -> None:
        self._objects, self._key, self._where, self._num_bytes = objects, key, where, num_bytes
        self._digests = digests.reshape(-1, DIGEST_BYTES)
        self._dtype = np.dtype(dtype)
        self._file = os.open(cache, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._file)
        self._seen = np.zeros(len(self._digests), np.bool_)  # blocks that were here when this process last looked
        self._guard = threading.Lock()
        self._under_way: dict[int, Future[dict[int, Bytes]]] = {}  # requests, by block
        self._soon = ThreadPoolExecutor(REQUESTS_AT_ONCE, "blocks")
        self._ahead = ThreadPoolExecutor(REQUESTS_AHEAD, "blocks ahead")
        self._is_full = False

    def __len__(self) -> int:
        return self._num_bytes // self._dtype.itemsize

    def take(self, places: Ints) -> NDArray[np.unsignedinteger]:
        flat = places.reshape(-1)
        tokens = np.empty(len(flat), self._dtype)
        absent = self._copy(self._divided(flat), flat, tokens, {})
        if absent:
            unkept = self._brought(list(absent), self._soon)
            if self._copy(absent, flat, tokens, unkept):
                raise OSError(errno.EIO, "this node's disk doesn't give back what was written", self._where)
        return tokens.reshape(places.shape)

    def fetch(self, places: Ints) -> bool:
        blocks = self._divided(places.reshape(-1))
        absent = [block for block in blocks if not self._seen[block] and not self._here(block)]
        return not self._brought(absent, self._ahead)

    def _divided(self, flat: Ints) -> dict[int, Ints]:
        """Indices of the places in each block, by block, ascending."""
        blocks = flat * self._dtype.itemsize // BLOCK_BYTES
        order = np.argsort(blocks, kind="stable")
        found, begins = np.unique(blocks[order], return_index=True)
        return dict(zip(found.tolist(), np.split(order, begins[1:]), strict=False))

    def _copy(
        self, wanted: dict[int, Ints], flat: Ints, tokens: NDArray[np.unsignedinteger], unkept: dict[int, Bytes]
    ) -> dict[int, Ints]:
        """Copy the tokens at places that are `_divided`. Returns those of blocks neither here nor in `unkept`."""
        absent = {}
        for block, which in wanted.items():
            data = unkept.get(block) or self._here(block)
            if data:
                first = block * BLOCK_BYTES // self._dtype.itemsize
                tokens[which] = np.frombuffer(data, self._dtype)[flat[which] - first]
            else:
                absent[block] = which
        return absent

    # -- blocks on this node -----------------------------------------------------------------------------------

    def _span(self, block: int) -> tuple[int, int]:
        return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._num_bytes)

    def _here(self, block: int) -> bytes:
        """A block from the file, verified; empty if it isn't there."""
        start, stop = self._span(block)
        data = b""
        with suppress(OSError):
            data = os.pread(self._file, stop - start, start)
        self._seen[block] = self._has_digest(block, data)
        return data if self._seen[block] else b""

    def _has_digest(self, block: int, data: Bytes) -> bool:
        return hashlib.sha256(data).digest() == bytes(self._digests[block])

    def _keep(self, block: int, data: Bytes) -> bool:
        """Write a verified block to the file. Returns whether the disk has taken it."""
        offset, rest = block * BLOCK_BYTES, memoryview(data)
        try:
            while rest:
                written = os.pwrite(self._file, rest, offset)
                offset, rest = offset + written, rest[written:]
        except OSError as error:
            if not self._is_full:
                log.warning("blocks of %s are read without keeping them here: %s", self._where, error.strerror)
            self._is_full = True
            return False
        self._is_full, self._seen[block] = False, True
        return True

    # -- blocks in the bucket ----------------------------------------------------------------------------------

    def _brought(self, absent: Sequence[int], pool: ThreadPoolExecutor) -> dict[int, Bytes]:
        """Fetch these blocks, ascending. Returns those that the disk has not taken."""
        unkept: dict[int, Bytes] = {}
        for request in self._requests(absent, pool):
            unkept |= request.result()
        return unkept

    def _requests(self, absent: Sequence[int], pool: ThreadPoolExecutor) -> set["Future[dict[int, Bytes]]"]:
        """Requests that bring these blocks, ascending: those under way, and new ones."""
        with self._guard:
            requests = {self._under_way[block] for block in absent if block in self._under_way}
            for blocks in _sequences([block for block in absent if block not in self._under_way]):
                request = pool.submit(self._fetch, blocks)
                requests.add(request)
                self._under_way.update(dict.fromkeys(blocks, request))
        return requests

    def _fetch(self, blocks: range) -> dict[int, Bytes]:
        """Fetch blocks in sequence. Returns those that the disk has not taken."""
        try:
            with self._alone(blocks):
                if all(self._here(block) for block in blocks):  # by another process
                    return {}
                return {block: data for block, data in self._verified_bytes(blocks) if not self._keep(block, data)}
        finally:
            with self._guard:
                for block in blocks:
                    del self._under_way[block]

    def _verified_bytes(self, blocks: range) -> Iterator[tuple[int, Bytes]]:
        """The blocks from the bucket. One that doesn't have its digest is fetched once more."""
        begin = blocks.start * BLOCK_BYTES
        data = memoryview(self._get(begin, self._span(blocks[-1])[1]))
        for block in blocks:
            start, stop = self._span(block)
            part: Bytes = data[start - begin : stop - begin]
            if not self._has_digest(block, part):
                part = self._get(start, stop)
            if not self._has_digest(block, part):
                found, written = hashlib.sha256(part).hexdigest(), bytes(self._digests[block]).hex()
                raise self._corrupt(
                    f"block {block} of {self._where}, bytes {start} to {stop}, has sha256 {found}; it was written with "
                    f"{written}"
                )
            yield block, part

    def _get(self, start: int, stop: int) -> bytes:
        try:
            return self._objects.get(self._key, start, stop)
        except FileNotFoundError:
            raise self._corrupt(f"{self._where} is no longer there") from None

    def _corrupt(self, message: str) -> StoreCorrupt:
        return StoreCorrupt(
            message,
            remedy=f"Delete {self._where} and resume the run, which stores it again.",
            unchanged="None of its bytes were used.",
        )

    @contextmanager
    def _alone(self, blocks: range) -> Iterator[None]:
        """Keep this node's other processes from fetching the same blocks meanwhile. A kill ends it, and a process that
        is stopped keeps others waiting for a limited time: only the number of requests depends on it."""
        start, stop = self._span(blocks.start)[0], self._span(blocks[-1])[1]
        until_s = time.monotonic() + OTHER_S
        while not self._locked(start, stop) and time.monotonic() < until_s:
            time.sleep(LOOK_S)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, stop - start, start)

    def _locked(self, start: int, stop: int) -> bool:
        """Lock bytes of the file, unless another process holds that lock."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - start, start)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # others: there are no locks here
        return True


def _sequences(blocks: Sequence[int]) -> Iterator[range]:
    """These ascending blocks as ranges of at most `BLOCKS_AT_ONCE`."""
    begin = 0
    for place in range(1, len(blocks) + 1):
        ends = place == len(blocks) or blocks[place] != blocks[place - 1] + 1 or place - begin == BLOCKS_AT_ONCE
        if ends:
            yield range(blocks[begin], blocks[place - 1] + 1)
            begin = place
