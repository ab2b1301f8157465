"""The format of a rank's snapshot: one contiguous byte range, with the part that its buddy receives first.

Both ends derive the format from the layout, so only bytes are sent. What every rank of the world has (dense weights,
buffers) is not in the buddy's part: every survivor has it too. It is in the rank's own copy, since a survivor may have
to go back a step. In a world of one everything is shared: there is no other rank, and a standby keeps the snapshots.

Weights that `model.init_from` has are in no snapshot.

A snapshot is *whole*, or a *delta*: the gradients of a step for this rank's part of the optimizer, from which the step
can be repeated, and the state that this rank's updates don't produce (weights of other ranks' parts, buffers, state of
compression).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.state_layout import IntArray, StateLayout
from orchestrator.elastic.state_spec import ITEM_BYTES, Origin, Sharing

ALIGNMENT = 64  # bytes; every range starts at a multiple, so any number format may be read in place


@dataclass(frozen=True, eq=False)
class SnapshotFormat:
    """Positions of n ranges in a snapshot.

    Args:
        names: [n], tensors; in a delta `grad/NAME` for what the rank updates of the parameter NAME.
        dtypes: [n], torch's names.
        start, stop: [n], elements of the flattened tensor.
        offset: [n], bytes from the beginning of the snapshot.
        num_shared: number of ranges, the first ones, that are sent to the buddy.
        shared_bytes, total_bytes: length of the buddy's part and of the whole snapshot.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    start: IntArray
    stop: IntArray
    offset: IntArray
    num_shared: int
    shared_bytes: int
    total_bytes: int

    @classmethod
    def of(cls, layout: StateLayout, rank: int) -> Self:
        """The format of one rank's whole snapshot in a layout."""
        everywhere = _is_everywhere(layout)
        rows = []
        for tensor, start, stop in layout.ranges_of(layout.world.members[rank]).tolist():
            name = layout.names[tensor]
            if layout.tensors[name].is_base:
                continue
            rows.append((name, layout.tensors[name].dtype, start, stop, bool(everywhere[tensor])))
        return cls._of_rows(rows)

    @classmethod
    def of_delta(cls, layout: StateLayout, rank: int) -> Self:
        """The format of one rank's delta in a layout."""
        everywhere, updates = _is_everywhere(layout), layout.updates_of(rank)
        rows = [(f"grad/{name}", "float32", *here, False) for name, here in updates.items()]
        for tensor, start, stop in layout.ranges_of(layout.world.members[rank]).tolist():
            spec = layout.tensors[layout.names[tensor]]
            remade = (start, stop) if spec.origin in (Origin.UPDATE, Origin.CONSTANT) else (start, start)
            if spec.origin is Origin.GATHER and spec.like is not None:
                remade = updates.get(spec.like.name, remade)
            rest = ((start, remade[0]), (remade[1], stop))
            rows += [(spec.name, spec.dtype, low, high, bool(everywhere[tensor])) for low, high in rest if low < high]
        return cls._of_rows(rows)

    @classmethod
    def _of_rows(cls, rows: list[tuple[str, str, int, int, bool]]) -> Self:
        """Ranges back to back, first those that not every rank has.

        Args:
            rows: (name, dtype, start, stop, whether every rank has it).
        """
        rows = sorted(rows, key=lambda row: row[4])
        num_bytes = np.array([(stop - start) * ITEM_BYTES[dtype] for _, dtype, start, stop, _ in rows], dtype=np.int64)
        offset = np.append(0, np.cumsum(-(-num_bytes // ALIGNMENT) * ALIGNMENT))
        num_shared = sum(not everywhere for *_, everywhere in rows)
        return cls(
            names=tuple(name for name, *_ in rows),
            dtypes=tuple(dtype for _, dtype, *_ in rows),
            start=np.array([start for _, _, start, _, _ in rows], dtype=np.int64),
            stop=np.array([stop for _, _, _, stop, _ in rows], dtype=np.int64),
            offset=offset[:-1],
            num_shared=num_shared,
            shared_bytes=int(offset[num_shared]),
            total_bytes=int(offset[-1]),
        )


def _is_everywhere(layout: StateLayout) -> NDArray[np.bool_]:
    """[T], bool: every rank of the world has all of the tensor, and there are several."""
    size = layout.world.size
    full = np.array([len(ranks) == size > 1 for ranks in layout.holder_sets] + [False])
    answer: NDArray[np.bool_] = (layout.sharing == Sharing.REPLICATED) & full[layout.holder_set]
    return answer


# -- Assignment of buddies ---------------------------------------------------------------------------------------------


def buddies_of(nodes: Sequence[str]) -> tuple[int, ...]:
    """For each rank the rank that keeps its snapshot, in another failure domain wherever possible.

    Every rank keeps one other rank's snapshot, so memory and traffic are the same everywhere. Ranks are ordered by
    node, the fullest first, and each takes the rank n places further, n being the fullest node's rank count: never on
    its own node, unless that holds more than half of the world. Then as many ranks as possible have a buddy elsewhere.

    Args:
        nodes: by rank, the node (failure domain) that it runs on.

    Returns:
        a permutation without fixed points; empty in a world of one.
    """
    size = len(nodes)
    if size < 2:
        return ()
    fullest = max(nodes.count(node) for node in set(nodes))
    return _shifted(_by_node(nodes), fullest if 2 * fullest <= size else max(size - fullest, 1))


def second_buddies_of(nodes: Sequence[str], buddies: Sequence[int]) -> tuple[int, ...]:
    """For each rank another rank than its buddy that keeps its snapshot too. Of all shifts in the ring of ranks the one
    with which ranks, buddies and second buddies are on most nodes. Empty in a world of fewer than three.

    Args:
        nodes: by rank.
        buddies: by rank, from `buddies_of`.
    """
    size = len(nodes)
    if size < 3:
        return ()
    order = _by_node(nodes)
    first = order.index(buddies[order[0]])
    rings = (_shifted(order, shift) for shift in range(1, size) if shift != first)

    def num_nodes(ring: tuple[int, ...]) -> int:
        return sum(len({nodes[rank], nodes[buddies[rank]], nodes[ring[rank]]}) for rank in range(size))

    return max(rings, key=num_nodes)


def _by_node(nodes: Sequence[str]) -> list[int]:
    """The ranks ordered by node, the fullest node first."""
    count = {node: nodes.count(node) for node in dict.fromkeys(nodes)}
    return sorted(range(len(nodes)), key=lambda rank: (-count[nodes[rank]], nodes[rank], rank))


def _shifted(order: Sequence[int], shift: int) -> tuple[int, ...]:
    """For each rank the one `shift` places further in a ring."""
    buddy = [0] * len(order)
    for place, rank in enumerate(order):
        buddy[rank] = order[(place + shift) % len(order)]
    return tuple(buddy)
