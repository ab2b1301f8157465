"""How a rank's shard lies in a snapshot: one stretch of bytes, the part that its buddy gets first.

Both ends derive the format from the layout, so only bytes travel. What every rank of the world has (dense weights,
buffers) stays out of the buddy's part: whoever survives has it too. It is in the rank's own copy, since a survivor may
have to go back a step.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from orchestrator.elastic.layout import IntArray, Kind, Layout

ALIGNMENT = 64  # bytes; every range starts at a multiple, so any number format may be read in place


@dataclass(frozen=True, eq=False)
class SnapshotFormat:
    """The places of n ranges in a snapshot.

    Args:
        names: [n], tensors.
        start, stop: [n], elements of the flattened tensor.
        itemsize: [n], bytes per element.
        offset: [n], bytes from the snapshot's beginning.
        num_shared: how many of the ranges, the first ones, go to the buddy.
        shared_bytes, total_bytes: length of the buddy's part and of the whole.
    """

    names: tuple[str, ...]
    start: IntArray
    stop: IntArray
    itemsize: IntArray
    offset: IntArray
    num_shared: int
    shared_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> Self:
        """The format of one rank's snapshot in a layout."""
        ranges = layout.ranges_of(layout.world.members[rank])
        everywhere = np.array([len(ranks) == layout.world.size for ranks in layout.holder_sets] + [False])
        tensor = ranges[:, 0]
        alone = (layout.kind[tensor] != Kind.REPLICATED) | ~everywhere[layout.holder_set[tensor]]
        ranges = np.concatenate([ranges[alone], ranges[~alone]])
        tensor, start, stop = ranges.T
        itemsize = layout.itemsize[tensor]
        num_bytes = (stop - start) * itemsize
        ends = np.cumsum(-(-num_bytes // ALIGNMENT) * ALIGNMENT)
        offset = np.append(0, ends)
        num_shared = int(alone.sum())
        return cls(
            names=tuple(layout.names[t] for t in tensor.tolist()),
            start=start,
            stop=stop,
            itemsize=itemsize,
            offset=offset[:-1],
            num_shared=num_shared,
            shared_bytes=int(offset[num_shared]),
            total_bytes=int(offset[-1]),
        )
