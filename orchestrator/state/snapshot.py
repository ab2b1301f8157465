"""Snapshots of shards in memory: this worker's own, and those that it keeps for others.

A snapshot is one buffer, laid out by `orchestrator.elastic.snapshot`. Buffers are used again and again, so a step
allocates nothing. While one is written the one before it stays whole: a state that is complete somewhere is never
given up for one that isn't yet.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from orchestrator.elastic.cut import Holding
from orchestrator.elastic.snapshot import SnapshotFormat
from orchestrator.state.ranges import NamedRanges

DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass
class Snapshot:
    """A shard, or the part of it that only its rank has.

    Args:
        holding: what it is a snapshot of.
        note: what belongs to the state and is no tensor.
        ranges: views into the buffer.
    """

    holding: Holding
    note: str
    buffer: Tensor
    ranges: NamedRanges


@dataclass
class Shelf:
    """Snapshots of one rank of one generation: the newest whole one, and the one being written.

    Args:
        format: of every snapshot here.
        shared_only: only the part that goes to a buddy is kept.
        pinned: buffers that a GPU can be copied to without a stop.
    """

    generation: int
    rank: int
    format: SnapshotFormat
    shared_only: bool
    pinned: bool = False
    whole: list[Snapshot] = field(default_factory=list)
    _free: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Both buffers at once, so that memory that doesn't suffice shows before the first step, not in the middle."""
        self._free = [torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=self.pinned) for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        return self.format.shared_bytes if self.shared_only else self.format.total_bytes

    def begin(self, step: int, note: str) -> Snapshot:
        """A snapshot to be filled; `finish` enters it. The oldest whole one gives its memory if there are two."""
        if len(self._free) == 0:
            oldest = min(self.whole, key=lambda s: s.holding.step)
            self.whole.remove(oldest)
            self._free.append(oldest.buffer)
        buffer = self._free.pop()
        return Snapshot(Holding(self.generation, step, self.rank), note, buffer, self._views(buffer))

    def finish(self, snapshot: Snapshot) -> None:
        self.whole.append(snapshot)

    def give_up(self, snapshot: Snapshot) -> None:
        """It won't be whole: its memory is free again."""
        self._free.append(snapshot.buffer)

    def shared(self, snapshot: Snapshot) -> memoryview:
        """The buddy's part, as bytes."""
        view: memoryview = snapshot.buffer[: self.format.shared_bytes].numpy().data
        return view

    def _views(self, buffer: Tensor) -> NamedRanges:
        form, ranges = self.format, NamedRanges()
        count = form.num_shared if self.shared_only else len(form.names)
        places = np.stack([form.start, form.stop, form.itemsize, form.offset], axis=1)[:count]
        for name, (start, stop, itemsize, offset) in zip(form.names[:count], places.tolist(), strict=True):
            data = buffer[offset : offset + (stop - start) * itemsize].view(DTYPES[itemsize])
            ranges.add(name, start, data)
        return ranges


@torch.no_grad()
def copy_into(snapshot: Snapshot, ranges: NamedRanges) -> None:
    """Fill a snapshot of one's own from the live shard."""
    for name, place in snapshot.ranges:
        place.data.copy_(ranges.view(name, place.start, place.stop))


class Vault:
    """All snapshots in this process, by generation: its own rank's, and its ward's."""

    def __init__(self) -> None:
        self._shelves: list[Shelf] = []

    def add(self, shelf: Shelf) -> Shelf:
        self._shelves.append(shelf)
        return shelf

    def drop_before(self, generation: int) -> None:
        """Forget older generations. From any thread."""
        if any(shelf.generation < generation for shelf in self._shelves):
            self._shelves = [shelf for shelf in self._shelves if shelf.generation >= generation]

    def holdings(self) -> tuple[Holding, ...]:
        held = {snapshot.holding for shelf in self._shelves for snapshot in list(shelf.whole)}
        return tuple(sorted(held, key=lambda h: (h.generation, h.step, h.rank)))

    def find(self, holding: Holding) -> Snapshot:
        """Raises KeyError if it isn't held whole."""
        for shelf in self._shelves:
            for snapshot in shelf.whole:
                if snapshot.holding == holding:
                    return snapshot
        raise KeyError(f"{holding} is not held here; held: {self.holdings()}")

    def num_bytes(self) -> int:
        return sum(2 * shelf.num_bytes for shelf in self._shelves)


def joined(parts: Collection[NamedRanges]) -> NamedRanges:
    """Ranges of several shards as one; what two of them have is taken from the first."""
    result = NamedRanges()
    for part in parts:
        for name, held in part:
            if not any(start < held.stop and held.start < stop for start, stop in result.spans(name)):
                result.add(name, held.start, held.data)
    return result
