"""Transfer plans: the moves that turn one layout into another.

    plan = TransferPlan.between(old, new)
    mine = plan.for_worker("w7")  # what w7 sends, receives, keeps and zeroes

Pure: every worker derives the same plan from the same two layouts, so no plan is ever sent. A move is one contiguous
run of one tensor, within one held range at both ends. No data that a worker holds and still needs is moved, every
element that it lacks comes from exactly one other worker, and the bytes are minimal for the two layouts. Weights that
`model.init_from` has are in no plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from orchestrator.elastic.state_layout import IntArray, StateLayout
from orchestrator.elastic.state_spec import Sharing
from orchestrator.elastic.world import union


@dataclass(frozen=True, eq=False)
class WorkerMoves:
    """One worker's part of a plan. All arrays are [n, 3], rows (tensor, start, stop) in elements, sorted.

    Sender and receiver see the same rows in the same order.

    Args:
        sends: by destination, in the order of the plan's workers.
        receives: by source, in the same order. Data received for a tensor that accumulates is added.
        keeps: held before and after.
        zeros: set to zero before anything is added.
    """

    sends: dict[str, IntArray]
    receives: dict[str, IntArray]
    keeps: IntArray
    zeros: IntArray


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Where every element of a new layout comes from. Tensors and workers are given by index.

    Args:
        workers: members of the old world, then those only in the new one.
        names, itemsize: of the T tensors; bytes per element.
        accumulates: [T], whether moves of the tensor are added at the destination (the tensor is partial).
        moves: [n, 5], rows (tensor, start, stop, source, destination), start and stop in elements.
        keeps: [n, 4], rows (tensor, start, stop, worker).
        zeros: [n, 4], likewise: a partial's new holders start from zero.
    """

    workers: tuple[str, ...]
    names: tuple[str, ...]
    itemsize: IntArray
    accumulates: tuple[bool, ...]
    moves: IntArray
    keeps: IntArray
    zeros: IntArray

    @classmethod
    def between(cls, old: StateLayout, new: StateLayout) -> Self:
        """The plan from `old` to `new`. Raises ValueError if they don't describe the same tensors."""
        _check_same_tensors(old, new)
        workers = union(old.world, new.world)
        number = {worker: index for index, worker in enumerate(workers)}
        new_workers = np.array([number[worker] for worker in new.world.members])

        found = _Found(moves=[], keeps=[], zeros=[])
        _plan_shards(old, new, new_workers, found)
        _plan_whole(old, new, new_workers, found)
        return cls(
            workers=workers,
            names=old.names,
            itemsize=old.itemsize,
            accumulates=tuple((old.sharing == Sharing.PARTIAL).tolist()),
            moves=_stacked(found.moves, 5),
            keeps=_stacked(found.keeps, 4),
            zeros=_stacked(found.zeros, 4),
        )

    @property
    def moved_bytes(self) -> int:
        """Bytes sent by all workers together."""
        return int(np.sum((self.moves[:, 2] - self.moves[:, 1]) * self.itemsize[self.moves[:, 0]]))

    def for_worker(self, worker: str) -> WorkerMoves:
        """The part of `worker`. Raises ValueError if it is in neither world."""
        index = self.workers.index(worker)
        return WorkerMoves(
            sends=self._by_peer(self.moves[self.moves[:, 3] == index], peer_column=4),
            receives=self._by_peer(self.moves[self.moves[:, 4] == index], peer_column=3),
            keeps=_sorted(self.keeps[self.keeps[:, 3] == index, :3]),
            zeros=_sorted(self.zeros[self.zeros[:, 3] == index, :3]),
        )

    def _by_peer(self, moves: IntArray, peer_column: int) -> dict[str, IntArray]:
        moves = moves[np.lexsort((moves[:, 1], moves[:, 0], moves[:, peer_column]))]
        peers, firsts = np.unique(moves[:, peer_column], return_index=True)
        parts = np.split(moves[:, :3], firsts[1:])
        return {
            self.workers[peer]: part for peer, part in zip(peers.tolist(), parts, strict=False)
        }  # without peers: one empty part


@dataclass(frozen=True, eq=False)
class _Found:
    """Rows found so far, as in `TransferPlan`."""

    moves: list[IntArray]
    keeps: list[IntArray]
    zeros: list[IntArray]


def _check_same_tensors(old: StateLayout, new: StateLayout) -> None:
    if old.names != new.names:
        differing = sorted(set(old.names) ^ set(new.names))
        raise ValueError(f"a plan needs the same tensors in the same order on both sides; differing: {differing[:5]}")
    for what in ("numel", "itemsize", "sharing"):
        (differs,) = np.nonzero(getattr(old, what) != getattr(new, what))
        if len(differs):
            raise ValueError(
                f"{what} of {old.names[differs[0]]} differs between the layouts; a plan moves bits as they are"
            )


def _plan_shards(old: StateLayout, new: StateLayout, new_workers: IntArray, found: _Found) -> None:
    """Sharded tensors, laid end to end on one line: between two boundaries of either layout no holder changes."""
    line = old.line()
    held_begin, need_begin = (line[layout.shards[:, 0]] + layout.shards[:, 1] for layout in (old, new))
    if not len(need_begin):
        return
    cuts = np.unique(np.concatenate([held_begin, need_begin, line[-1:]]))
    begin, end = cuts[:-1], cuts[1:]
    need = np.searchsorted(need_begin, begin, side="right") - 1
    have = np.searchsorted(held_begin, begin, side="right") - 1
    tensor, start, stop = new.shards[need, 0], begin - line[new.shards[need, 0]], end - line[new.shards[need, 0]]
    source, destination = old.shards[have, 3], new_workers[new.shards[need, 3]]  # old ranks are indices in plan.workers
    stays = source == destination
    found.keeps.append(np.stack([tensor, start, stop, source], axis=1)[stays])
    found.moves.append(np.stack([tensor, start, stop, source, destination], axis=1)[~stays])


def _plan_whole(old: StateLayout, new: StateLayout, new_workers: IntArray, found: _Found) -> None:
    """Replicated and partial tensors, by class: those with the same sharing and the same holders before and after."""
    moves = np.array([not tensor.is_base for tensor in new.tensors.values()], dtype=np.bool_)
    (whole,) = np.nonzero((old.sharing != Sharing.SHARDED) & moves)
    if not len(whole):
        return
    keys = np.stack([old.sharing[whole], old.holder_set[whole], new.holder_set[whole]], axis=1)
    classes, class_of = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(class_of.ravel(), kind="stable")
    starts = np.searchsorted(class_of.ravel()[order], np.arange(1, len(classes)))
    for (sharing, before, after), members in zip(classes.tolist(), np.split(whole[order], starts), strict=True):
        holders = old.holder_sets[before]
        wanted = new_workers[list(new.holder_sets[after])].tolist()
        had = set(holders)
        staying = [worker for worker in wanted if worker in had]
        joining = [worker for worker in wanted if worker not in had]
        found.keeps.append(_of_each(old, members, staying))
        if sharing == Sharing.REPLICATED:
            found.moves.append(_spread(old, members, holders, joining))
        else:
            leaving = [worker for worker in holders if worker not in set(wanted)]
            found.zeros.append(_of_each(old, members, joining))
            heirs = staying or joining
            for nth, source in enumerate(leaving):
                found.moves.append(_with(_of_each(old, members, [source]), heirs[nth % len(heirs)]))


def _spread(layout: StateLayout, tensors: IntArray, holders: Sequence[int], joining: Sequence[int]) -> IntArray:
    """Moves of whole `tensors` to all of `joining`, with the same load for all of `holders`.

    The bytes to be received are laid on one line, by receiver and then by tensor, and every holder sends an equal
    stretch of it: loads differ by two elements at most, and few moves are split.
    """
    if not joining:
        return np.zeros((0, 5), dtype=np.int64)
    begin = np.append(0, np.cumsum(layout.numel[tensors] * layout.itemsize[tensors]))
    num_bytes = int(begin[-1])  # per receiver
    shares = np.array([nth * num_bytes * len(joining) // len(holders) for nth in range(len(holders))])
    at = shares % num_bytes
    nth_tensor = np.searchsorted(begin, at, side="right") - 1
    shares -= (at - begin[nth_tensor]) % layout.itemsize[tensors[nth_tensor]]  # never within an element
    borders = (np.arange(len(joining))[:, None] * num_bytes + begin[:-1]).ravel()
    cuts = np.unique(np.concatenate([borders, shares, [num_bytes * len(joining)]]))

    receiver, at = np.divmod(cuts[:-1], num_bytes)
    nth_tensor = np.searchsorted(begin, at, side="right") - 1
    tensor = tensors[nth_tensor]
    start = (at - begin[nth_tensor]) // layout.itemsize[tensor]
    stop = start + np.diff(cuts) // layout.itemsize[tensor]
    source = np.array(holders)[np.searchsorted(shares, cuts[:-1], side="right") - 1]
    return np.stack([tensor, start, stop, source, np.array(joining)[receiver]], axis=1)


def _of_each(layout: StateLayout, tensors: IntArray, workers: Sequence[int]) -> IntArray:
    """[n, 4], rows (tensor, 0, numel, worker): each tensor for each worker."""
    tensor = np.tile(tensors, len(workers))
    worker = np.repeat(np.array(workers, dtype=np.int64), len(tensors))
    return np.stack([tensor, np.zeros_like(tensor), layout.numel[tensor], worker], axis=1)


def _with(rows: IntArray, destination: int) -> IntArray:
    return np.concatenate([rows, np.full((len(rows), 1), destination, dtype=np.int64)], axis=1)


def _sorted(rows: IntArray) -> IntArray:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def _stacked(parts: Sequence[IntArray], columns: int) -> IntArray:
    return np.concatenate([np.zeros((0, columns), dtype=np.int64), *parts])
