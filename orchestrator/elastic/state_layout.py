"""Layout of the training state: which rank holds which element range of every training tensor.

`training_layout` reproduces how ZeRO 1 and 2 partition the state of a model, so that a plan between two worlds needs no
engine. Struct of arrays: at 1,024 ranks and 50,000 tensors an object per range would take minutes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.bucket_partition import buckets, is_compressed, piece_multiple, rank_of_product
from orchestrator.elastic.expert_placement import ExpertPlacement, ReplicaSet
from orchestrator.elastic.param_spec import ParamSpec
from orchestrator.elastic.world import World
from orchestrator.spec.communication import CommunicationSpec

IntArray = NDArray[np.int64]
DEFAULT = CommunicationSpec()


class TensorKind(IntEnum):
    """How the ranks of a tensor share it."""

    SHARDED = 0  # disjoint ranges cover it
    REPLICATED = 1  # each holder has all of it, and the same
    PARTIAL = 2  # each holder has values for all of it; the tensor is their sum


@dataclass(frozen=True, eq=False)
class StateLayout:
    """The holders of T tensors in a world.

    Args:
        names: of the tensors, distinct.
        numel: [T], elements.
        itemsize: [T], bytes per element.
        kind: [T], values of `TensorKind`.
        holder_sets: rank tuples, ascending; many tensors share one.
        holder_set: [T], index in `holder_sets` of a replicated or partial tensor; -1 if sharded.
        shards: [n, 4], rows (tensor, start, stop, rank) in elements, sorted; only of sharded tensors. A row is
            contiguous in memory.

    Raises:
        ValueError: arrays that don't match each other, an empty holder set, or shards that don't cover each sharded
            tensor exactly once.
    """

    world: World
    names: tuple[str, ...]
    numel: IntArray
    itemsize: IntArray
    kind: IntArray
    holder_sets: tuple[ReplicaSet, ...]
    holder_set: IntArray
    shards: IntArray

    def __post_init__(self) -> None:
        num_tensors = len(self.names)
        if len(set(self.names)) != num_tensors:
            twice = [name for name, count in Counter(self.names).items() if count > 1]
            raise ValueError(f"tensors {twice} are named twice in a layout; names are distinct")
        for array in (self.numel, self.itemsize, self.kind, self.holder_set):
            if array.shape != (num_tensors,):
                raise ValueError(f"a layout of {num_tensors} tensors got an array of shape {array.shape}")
        for ranks in self.holder_sets:
            if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 0 or ranks[-1] >= self.world.size:
                raise ValueError(f"holder set {ranks}; one or more distinct ascending ranks below {self.world.size}")
        sharded = self.kind == TensorKind.SHARDED
        in_range = np.where(sharded, self.holder_set == -1, (self.holder_set >= 0))
        if not in_range.all() or (self.holder_set >= len(self.holder_sets)).any():
            raise ValueError(f"holder_set is -1 for sharded tensors, else below {len(self.holder_sets)}")
        self._check_shards(sharded)

    def _check_shards(self, sharded: NDArray[np.bool_]) -> None:
        if self.shards.ndim != 2 or self.shards.shape[1] != 4:
            raise ValueError(f"shards have shape {self.shards.shape}; rows are (tensor, start, stop, rank)")
        tensor, start, stop, rank = self.shards.T
        if len(tensor) and (tensor.min() < 0 or tensor.max() >= len(self.names) or not sharded[tensor].all()):
            raise ValueError("a shard names a tensor that is not sharded")
        if ((start < 0) | (start >= stop) | (stop > self.numel[tensor])).any():
            raise ValueError("a shard is empty or reaches beyond its tensor")
        if ((rank < 0) | (rank >= self.world.size)).any():
            raise ValueError(f"a shard lies on a rank outside the world of {self.world.size}")
        base = self.line()
        begin, end = base[tensor] + start, base[tensor] + stop
        if not np.array_equal(np.append(begin, base[-1]), np.append(0, end)):
            raise ValueError("shards must be sorted and cover every sharded tensor exactly once")

    def line(self) -> IntArray:
        """[T + 1]: offset of each tensor if only the sharded ones are laid end to end; last, the total length."""
        return np.append(0, np.cumsum(np.where(self.kind == TensorKind.SHARDED, self.numel, 0)))

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
    params: Sequence[ParamSpec],
    placement: ExpertPlacement,
    world: World,
    mixed_precision: bool,
    buffers: Sequence[tuple[str, int]],
    communication: CommunicationSpec = DEFAULT,
) -> StateLayout:
    """The layout of a run's training state under ZeRO 1 or 2 with our parameter groups.

    Dense parameters belong to all ranks, those of an expert to its replica set. Parameters of the same ranks,
    compressed ones apart, are grouped into buckets, each of which is laid end to end in the order of `params`, padded,
    and divided into equal partitions, one per rank in order. Tensors of a parameter NAME: `param/NAME` replicated over
    its ranks; `exp_avg/NAME`, `exp_avg_sq/NAME` and, with mixed precision, `master/NAME` sharded over them; for a
    buffer, `buffer/NAME` on all ranks. State of compression: `residual/NAME` and `velocity/NAME`, of which each rank
    has a part, and `powersgd/NAME` on all ranks.

    Args:
        params: every parameter of the whole model, in the engine's order, the same in every world.
        mixed_precision: parameters have 2 bytes and fp32 masters; otherwise they have 4 and are their own masters.
        buffers: (name, numel) of fp32 state that every rank holds.

    Raises:
        ValueError: a placement for another world size, or a parameter of an expert that isn't placed.
    """
    if placement.world_size != world.size:
        raise ValueError(f"the placement is for {placement.world_size} ranks; the world has {world.size}")
    everyone = tuple(range(world.size))
    groups: dict[tuple[ReplicaSet | None, bool], list[int]] = {(None, False): []}  # None: dense, on all ranks
    for index, spec in enumerate(params):
        if spec.expert is not None and not 0 <= spec.expert < placement.num_experts:
            raise ValueError(f"{spec.name} belongs to expert {spec.expert}; {placement.num_experts} are placed")
        replicas = None if spec.expert is None else placement.replica_set(spec.expert)
        groups.setdefault((replicas, is_compressed(spec, communication.compression)), []).append(index)
    holder_sets = tuple(everyone if replicas is None else replicas for replicas, _ in groups)
    param_numel = np.array([spec.numel for spec in params], dtype=np.int64)
    group = np.zeros(len(params), dtype=np.int64)
    rows = []
    for number, ((_, compressed), members) in enumerate(groups.items()):
        of_group = np.array(members, dtype=np.int64)
        group[of_group] = number
        for cut in buckets(param_numel[of_group].tolist(), len(holder_sets[number]), communication):
            rows.append(_partition(of_group[cut], param_numel, holder_sets[number], piece_multiple(compressed)))
    shards = _sorted(rows)

    sharded_prefixes = ("master", "exp_avg", "exp_avg_sq") if mixed_precision else ("exp_avg", "exp_avg_sq")
    kept = kept_tensors(params, communication)
    others = [*((f"buffer/{name}", numel, TensorKind.REPLICATED) for name, numel in buffers), *kept]
    names = [f"{prefix}/{spec.name}" for prefix in ("param", *sharded_prefixes) for spec in params]
    num_params, num_sharded, num_others = len(params), len(sharded_prefixes) * len(params), len(others)
    return StateLayout(
        world=world,
        names=(*names, *(name for name, _, _ in others)),
        numel=np.concatenate(
            [np.tile(param_numel, 1 + len(sharded_prefixes)), np.array([n for _, n, _ in others], dtype=np.int64)]
        ),
        itemsize=np.repeat([2 if mixed_precision else 4, 4, 4], [num_params, num_sharded, num_others]),
        kind=np.concatenate(
            [
                np.repeat([TensorKind.REPLICATED, TensorKind.SHARDED], [num_params, num_sharded]),
                np.array([kind for _, _, kind in others], dtype=np.int64),
            ]
        ),
        holder_sets=holder_sets,
        holder_set=np.concatenate([group, np.repeat([-1, 0], [num_sharded, num_others])]),
        shards=np.concatenate(  # the same boundaries for other tensors
            [shards + np.array([(1 + nth) * num_params, 0, 0, 0]) for nth in range(len(sharded_prefixes))]
        ),
    )


def kept_tensors(params: Sequence[ParamSpec], communication: CommunicationSpec) -> list[tuple[str, int, TensorKind]]:
    """State that compression keeps between steps, in fp32, on all ranks: (name, elements, kind)."""
    compression = communication.compression
    compressed = [spec for spec in params if is_compressed(spec, compression)]
    kept = []
    if compression.error_feedback:
        kept += [(f"residual/{spec.name}", spec.numel, TensorKind.PARTIAL) for spec in compressed]
    if compression.momentum:
        kept += [(f"velocity/{spec.name}", spec.numel, TensorKind.PARTIAL) for spec in compressed]
    if compression.scheme == "powersgd":
        columns = [spec.numel // spec.rows * rank_of_product(spec, compression) for spec in compressed]
        kept += [(f"powersgd/{s.name}", n, TensorKind.REPLICATED) for s, n in zip(compressed, columns, strict=True)]
    return kept


def _partition(param: IntArray, param_numel: IntArray, ranks: ReplicaSet, multiple: int) -> IntArray:
    """[n, 4], rows (param, start, stop, rank): a bucket's flat buffer divided into one partition per holder."""
    begin = np.append(0, np.cumsum(param_numel[param]))
    total, alignment = int(begin[-1]), multiple * len(ranks)
    partition_size = -(-total // alignment) * alignment // len(ranks)
    cuts = np.unique(np.append(begin, np.arange(0, total, partition_size)))  # behind `total` is padding
    start, stop = cuts[:-1], cuts[1:]
    nth = np.searchsorted(begin, start, side="right") - 1
    rank = np.array(ranks)[start // partition_size]
    return np.stack([param[nth], start - begin[nth], stop - begin[nth], rank], axis=1)


def _sorted(rows: Sequence[IntArray]) -> IntArray:
    shards = np.concatenate(rows) if rows else np.zeros((0, 4), dtype=np.int64)
    return shards[np.lexsort((shards[:, 1], shards[:, 0]))]
