"""Layout of the training state: which rank holds which element range of every training tensor.

`training_layout` reproduces how ZeRO 1 and 2 partition the state of a model, so that a plan between two worlds needs no
engine. Struct of arrays: at 1,024 ranks and 50,000 tensors an object per range would take minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.bucket_partition import BucketCut, cut_buckets
from orchestrator.elastic.expert_placement import ExpertPlacement, ReplicaSet
from orchestrator.elastic.state_spec import Inventory, ParamSpec, Sharing, is_compressed
from orchestrator.elastic.world import World
from orchestrator.spec.communication import CommunicationSpec

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The holders of T tensors in a world.

    Args:
        tensors: by name, in the order of all arrays here.
        holder_sets: rank tuples, ascending; many tensors share one.
        holder_set: [T], index in `holder_sets` of a replicated or partial tensor; -1 if sharded.
        shards: [n, 4], rows (tensor, start, stop, rank) in elements, sorted; only of sharded tensors. A row is
            contiguous in memory.

    Raises:
        ValueError: arrays that don't match each other, an empty holder set, or shards that don't cover each sharded
            tensor exactly once.
    """

    world: World
    tensors: Inventory
    holder_sets: tuple[ReplicaSet, ...]
    holder_set: IntArray
    shards: IntArray

    def __post_init__(self) -> None:
        if self.holder_set.shape != (len(self.tensors),):
            raise ValueError(f"a layout of {len(self.tensors)} tensors got an array of shape {self.holder_set.shape}")
        for ranks in self.holder_sets:
            if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 0 or ranks[-1] >= self.world.size:
                raise ValueError(f"holder set {ranks}; one or more distinct ascending ranks below {self.world.size}")
        sharded = self.sharing == Sharing.SHARDED
        in_range = np.where(sharded, self.holder_set == -1, (self.holder_set >= 0))
        if not in_range.all() or (self.holder_set >= len(self.holder_sets)).any():
            raise ValueError(f"holder_set is -1 for sharded tensors, else below {len(self.holder_sets)}")
        self._check_shards(sharded)

    def _check_shards(self, sharded: NDArray[np.bool_]) -> None:
        if self.shards.ndim != 2 or self.shards.shape[1] != 4:
            raise ValueError(f"shards have shape {self.shards.shape}; rows are (tensor, start, stop, rank)")
        tensor, start, stop, rank = self.shards.T
        if len(tensor) and (tensor.min() < 0 or tensor.max() >= len(self.tensors) or not sharded[tensor].all()):
            raise ValueError("a shard names a tensor that is not sharded")
        if ((start < 0) | (start >= stop) | (stop > self.numel[tensor])).any():
            raise ValueError("a shard is empty or reaches beyond its tensor")
        if ((rank < 0) | (rank >= self.world.size)).any():
            raise ValueError(f"a shard lies on a rank outside the world of {self.world.size}")
        base = self.line()
        begin, end = base[tensor] + start, base[tensor] + stop
        if not np.array_equal(np.append(begin, base[-1]), np.append(0, end)):
            raise ValueError("shards must be sorted and cover every sharded tensor exactly once")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @cached_property
    def numel(self) -> IntArray:
        """[T], elements."""
        return np.array([tensor.numel for tensor in self.tensors.values()], dtype=np.int64)

    @cached_property
    def itemsize(self) -> IntArray:
        """[T], bytes per element."""
        return np.array([tensor.item_bytes for tensor in self.tensors.values()], dtype=np.int64)

    @cached_property
    def sharing(self) -> IntArray:
        """[T], values of `Sharing`."""
        return np.array([tensor.sharing for tensor in self.tensors.values()], dtype=np.int64)

    @cached_property
    def cuts(self) -> dict[str, int]:
        """The first tensor that is sharded like a parameter, by the parameter's name: its shards are what each rank
        updates of the parameter."""
        found: dict[str, int] = {}
        for index, tensor in enumerate(self.tensors.values()):
            if tensor.sharing is Sharing.SHARDED and tensor.like is not None:
                found.setdefault(tensor.like.name, index)
        return found

    def updates_of(self, rank: int) -> dict[str, tuple[int, int]]:
        """By parameter, the elements [start, stop) that a rank updates, where it updates any."""
        parameter = {index: (name, self.tensors[self.names[index]]) for name, index in self.cuts.items()}
        mine = self.shards[self.shards[:, 3] == rank, :3].tolist()
        of_cuts = [(*parameter[tensor], start, stop) for tensor, start, stop in mine if tensor in parameter]
        return {name: tensor.of_param(start, stop) for name, tensor, start, stop in of_cuts}

    def line(self) -> IntArray:
        """[T + 1]: offset of each tensor if only the sharded ones are laid end to end; last, the total length."""
        return np.append(0, np.cumsum(np.where(self.sharing == Sharing.SHARDED, self.numel, 0)))

    def ranges_of(self, worker: str) -> IntArray:
        """[n, 3], rows (tensor, start, stop) that `worker` holds, sorted. Raises ValueError if it is not a member."""
        rank = self.world.rank_of(worker)
        sharded = self.shards[self.shards[:, 3] == rank, :3]
        mine = np.array([rank in ranks for ranks in self.holder_sets] + [False])  # the last entry is for index -1
        (tensor,) = np.nonzero(mine[self.holder_set])
        whole = np.stack([tensor, np.zeros_like(tensor), self.numel[tensor]], axis=1)
        ranges = np.concatenate([sharded, whole])
        return ranges[np.lexsort((ranges[:, 1], ranges[:, 0]))]

    def bytes_per_rank(self) -> IntArray:
        """[world size], bytes that each rank holds."""
        held = np.zeros(self.world.size, dtype=np.int64)
        tensor, start, stop, rank = self.shards.T
        np.add.at(held, rank, (stop - start) * self.itemsize[tensor])
        for index, ranks in enumerate(self.holder_sets):
            of_set = self.holder_set == index
            held[list(ranks)] += np.sum(self.numel[of_set] * self.itemsize[of_set])
        return held


def training_layout(
    tensors: Inventory, placement: ExpertPlacement, world: World, communication: CommunicationSpec
) -> StateLayout:
    """The layout of a run's training state under ZeRO 1 or 2 with our parameter groups.

    Dense parameters belong to all ranks, those of an expert to its replica set. Parameters of the same ranks that are
    updated alike, compressed ones apart, are grouped into buckets (`elastic.bucket_partition`), each of which is
    divided into equal partitions, one per rank in order. Tensors that are sharded like a parameter have
    its cuts, others like it are on its ranks, all others on all ranks.

    Raises:
        ValueError: a placement for another world size, or a parameter of an expert that isn't placed.
    """
    if placement.world_size != world.size:
        raise ValueError(f"the placement is for {placement.world_size} ranks; the world has {world.size}")
    everyone, params = tuple(range(world.size)), _params_of(tensors)
    groups = _grouped(params, placement, communication)
    holder_sets = tuple(dict.fromkeys([everyone, *(group.ranks for group in groups)]))
    param_numel = np.array([spec.numel for spec in params], dtype=np.int64)
    holders = np.zeros(len(params) + 1, dtype=np.int64)  # the last entry is for index -1
    rows = []
    for group in groups:
        holders[group.members] = holder_sets.index(group.ranks)
        rows += [_partition(group.members, param_numel, group.ranks, cut) for cut in group.cuts]

    number_of = {spec.name: index for index, spec in enumerate(params)}
    like = np.array([-1 if t.like is None else number_of[t.like.name] for t in tensors.values()], dtype=np.int64)
    is_sharded = np.array([t.sharing is Sharing.SHARDED for t in tensors.values()], dtype=np.bool_)
    shards = _shards_of(np.flatnonzero(is_sharded), like[is_sharded], _sorted(rows))
    numel = np.array([t.numel for t in tensors.values()], dtype=np.int64)
    is_other_size = (numel != np.append(param_numel, 0)[like])[shards[:, 0]]  # so its parameter is whole, and it too
    shards[is_other_size, 2] = numel[shards[is_other_size, 0]]
    return StateLayout(
        world=world,
        tensors=tensors,
        holder_sets=holder_sets,
        holder_set=np.where(is_sharded, -1, holders[like]),
        shards=shards,
    )


def filler_per_rank(tensors: Inventory, placement: ExpertPlacement, communication: CommunicationSpec) -> IntArray:
    """[world size], elements of the buckets on each rank that are no parameter's: they make a bucket's pieces equally
    long, and have weights and gradients. Many where whole parameters are dealt to many ranks. Raises as
    `training_layout`."""
    params = _params_of(tensors)
    numel = np.array([spec.numel for spec in params], dtype=np.int64)
    filler = np.zeros(placement.world_size, dtype=np.int64)
    for group in _grouped(params, placement, communication):
        length = sum(cut.piece for cut in group.cuts) * len(group.ranks)
        filler[list(group.ranks)] += length - int(numel[group.members].sum()) if group.cuts else 0
    return filler


def _params_of(tensors: Inventory) -> list[ParamSpec]:
    return list({t.like.name: t.like for t in tensors.values() if t.like is not None}.values())


@dataclass(frozen=True, eq=False)
class _Group:
    """Parameters on the same ranks that are updated alike.

    Args:
        members: [n], their indexes.
        cuts: their buckets, of indexes in `members`; none of parameters that aren't trained.
    """

    ranks: ReplicaSet
    members: IntArray
    cuts: list[BucketCut]


def _grouped(params: Sequence[ParamSpec], placement: ExpertPlacement, communication: CommunicationSpec) -> list[_Group]:
    # Of None for ranks: dense, on all. Of None for the update: not trained, in no bucket.
    groups: dict[tuple[ReplicaSet | None, bool, tuple[str, float] | None], list[int]] = {}
    for index, spec in enumerate(params):
        if spec.expert is not None and not 0 <= spec.expert < placement.num_experts:
            raise ValueError(f"{spec.name} belongs to expert {spec.expert}; {placement.num_experts} are placed")
        replicas = None if spec.expert is None else placement.replica_set(spec.expert, spec.name)
        key = (replicas, is_compressed(spec, communication.compression), spec.update if spec.is_trained else None)
        groups.setdefault(key, []).append(index)
    found = []
    for (replicas, compressed, update), members in groups.items():
        ranks = tuple(range(placement.world_size)) if replicas is None else replicas
        numel, is_whole = [params[index].numel for index in members], params[members[0]].is_whole
        cuts = cut_buckets(numel, len(ranks), communication, compressed, is_whole) if update is not None else []
        found.append(_Group(ranks, np.array(members, dtype=np.int64), cuts))
    return found


def _shards_of(tensors: IntArray, like: IntArray, rows: IntArray) -> IntArray:
    """[n, 4], rows (tensor, start, stop, rank) of tensors that are sharded like parameters.

    Args:
        like: by tensor, its parameter.
        rows: (parameter, start, stop, rank), sorted.
    """
    first, last = np.searchsorted(rows[:, 0], like), np.searchsorted(rows[:, 0], like, side="right")
    count = last - first
    begin = np.cumsum(count) - count
    taken = rows[np.repeat(first - begin, count) + np.arange(count.sum())]
    return np.column_stack([np.repeat(tensors, count), taken[:, 1:]])


def _partition(of_group: IntArray, param_numel: IntArray, ranks: ReplicaSet, cut: BucketCut) -> IntArray:
    """[n, 4], rows (param, start, stop, rank): a bucket's flat buffer divided into one partition per holder."""
    param, begin = of_group[list(cut.members)], np.array(cut.starts, dtype=np.int64)
    end = begin + param_numel[param]
    start = np.unique(np.concatenate([begin, np.arange(0, int(end.max()), cut.piece)]))
    nth = np.searchsorted(begin, start, side="right") - 1
    within = (nth >= 0) & (start < end[nth])  # what begins elsewhere is filler
    start, nth = start[within], nth[within]
    stop = np.minimum(end[nth], (start // cut.piece + 1) * cut.piece)
    rank = np.array(ranks)[start // cut.piece]
    return np.stack([param[nth], start - begin[nth], stop - begin[nth], rank], axis=1)


def _sorted(rows: Sequence[IntArray]) -> IntArray:
    shards = np.concatenate(rows) if rows else np.zeros((0, 4), dtype=np.int64)
    return shards[np.lexsort((shards[:, 1], shards[:, 0]))]
