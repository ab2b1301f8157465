"""Memory for snapshots, reused from one generation to the next.

Each generation keeps several hundred megabytes of snapshots, in a dozen buffers, and two generations' exist while
one follows the other. Allocated by malloc anew each time, they leave holes that the next ones don't quite fit, so the
heap grows with every rebuild although nothing more is in use.
"""

import threading
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Block = NDArray[np.uint8]

# A block may be so many times the requested size. Enough for worlds of 2 and 3 workers to use each other's: where one
# rebuild follows another at once, the free blocks are those of a world of the other size.
MOST_SPARE = 1.6


class Buffers:
    """Hands out buffers in host memory, and takes each back once no tensor or array refers to it any more: a thread
    that still fills a buffer of an ended generation can't write to the next one's. From any thread."""

    def __init__(self) -> None:
        self._taking = threading.Lock()
        self._free: list[Block] = []
        self._idle: list[Block] = []  # those of them that have been free since the last `drop_idle`
        # Filled by finalizers, which may run in any thread at any moment, one that is taking a buffer included: they
        # must not wait for the lock.
        self._returned: deque[Block] = deque()
        self.made_bytes = 0  # allocated so far
        self.held_bytes = 0  # of them, those that are lent or wait for the next one

    def take(self, num_bytes: int) -> Tensor:
        """A flat buffer of bytes with any content: in the smallest free block where one fits, else in a new one."""
        with self._taking:
            self._collect()
            fitting = [block for block in self._free if num_bytes <= len(block) <= MOST_SPARE * num_bytes]
            if fitting:
                block = min(fitting, key=len)
                self._free, self._idle = _without(block, self._free), _without(block, self._idle)
            else:
                block = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").numpy()
                self.made_bytes += num_bytes
                self.held_bytes += num_bytes
        lent = block[:]  # the only view of the block, and it lives as long as anything made of it
        weakref.finalize(lent, self._returned.append, block).atexit = False
        return torch.from_numpy(lent)[:num_bytes]

    def drop_idle(self) -> None:
        """Return blocks to malloc that were unused since the last call, such as those of a world of another size."""
        with self._taking:
            self._collect()
            for block in self._idle:
                self._free = _without(block, self._free)
                self.held_bytes -= len(block)
            self._idle = list(self._free)

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())


def _without(block: Block, blocks: list[Block]) -> list[Block]:
    return [other for other in blocks if other is not block]
