"""Memory obtained from the system before a fence or a step needs it.

Workers keep freed memory (`orchestrator.controller.worker_group`), so a fence waits for the kernel only where
it needs more than the process ever had, or in larger pieces. In that case a virtual machine needs one to four seconds
per GB, as its host has to find the pages first.
"""

import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

from orchestrator.policy.estimate.worker_memory import MemoryPlan
from orchestrator.state.buffers import Buffers, populate
from orchestrator.worker.step.memory_probe import room

PIECE = 1 << 22  # bytes populated by one call
# Added to what is reserved: malloc needs a larger hole for an aligned block, and cuts small blocks off holes.
ROOM_TO_ALIGN = mmap.PAGESIZE
FOR_SMALL_ONES = 1 << 22


class ReservedMemory:
    """Memory of a newcomer. The memory that its first fence fills is populated at once, the rest of its planned peak at
    the lowest priority, while it stands by or has joined. That rest is free meanwhile: earlier allocations there keep
    their content.

    Args:
        planned: memory plan of the worker's world, as `orchestrator job plan` shows it.
        buffers: for snapshots.
    """

    def __init__(self, planned: MemoryPlan, buffers: Buffers) -> None:
        first = torch.empty(planned.engine, dtype=torch.uint8)
        later = torch.empty(planned.heap - planned.engine, dtype=torch.uint8)  # behind it
        first.fill_(1)
        self._pieces = _pieces(later)
        self._buffers = buffers
        self._for_snapshots = planned.snapshots + planned.deltas + planned.first_snapshots

    def populate_the_rest(self) -> None:
        """Populate the remaining memory in a background thread."""
        threading.Thread(target=self._populate, name="memory", daemon=True).start()

    def _populate(self) -> None:
        with suppress(AttributeError, OSError):  # of this thread alone; Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        populate(self._pieces)
        self._buffers.populate(self._for_snapshots)


def reserve_buffers(num_bytes: int, buffers: Buffers) -> None:
    """Have so many free bytes for snapshots. Does nothing where the machine or the control group has less than that
    left."""
    there = room(torch.device("cpu"))
    if num_bytes <= there.limit_bytes - there.used_bytes:
        buffers.populate(buffers.lent_bytes + num_bytes)


def reserve(sizes: Iterable[int]) -> None:
    """Obtain memory for blocks of these sizes in bytes, all at once, and leave it free for later allocations.

    Blocks go into free holes of the heap where they fit, so only what is missing comes from the system. Does nothing
    where the machine or the control group has less than that left: training holds activations now that are free at the
    fence, so the blocks may fit then.
    """
    wanted = [FOR_SMALL_ONES, *(size + ROOM_TO_ALIGN for size in sorted(sizes, reverse=True))]
    there = room(torch.device("cpu"))
    if sum(wanted) > there.limit_bytes - there.used_bytes:
        return
    blocks = [torch.empty(size, dtype=torch.uint8) for size in wanted]
    for block in blocks:
        populate(_pieces(block))


def _pieces(block: Tensor) -> range:
    """Addresses of the pieces that cover the block's whole pages. The block may be freed before they are used."""
    page = mmap.PAGESIZE
    begin = -(-block.data_ptr() // page) * page
    return range(begin, max(begin, (block.data_ptr() + len(block)) // page * page), PIECE)
