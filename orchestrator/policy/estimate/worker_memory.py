"""Memory of a worker at a world size, by part. Pure: from the job and the list of the model's parameters.

Exact: weights, masters, moments and buffers, which follow from the layout. Estimates: gradients' buffers, activations
and the loss, from the memory that buckets and autograd were measured to keep.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.elastic.bucket_partition import UNDER_WAY, capacity
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import IntArray, StateLayout, filler_per_rank, training_layout
from orchestrator.elastic.state_spec import Origin, ParamSpec, Sharing, of_model
from orchestrator.elastic.world import World
from orchestrator.policy.estimate.activations import activation_bytes, item_bytes, loss_bytes
from orchestrator.policy.estimate.curriculum_stages import longest_row
from orchestrator.spec.distill import LOGITS_HELD
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import PREFERENCE

PROCESS_BYTES = 320_000_000  # its own memory and its share of libraries' pages, once torch and DeepSpeed are imported


@dataclass(frozen=True)
class StatePlan:
    """The parameters of a model in the engine's order, and its buffers as (name, shape)."""

    params: tuple[ParamSpec, ...]
    buffers: tuple[tuple[str, tuple[int, ...]], ...]
    vocab_size: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the worker that holds most.

    Args:
        kept: state of gradient compression.
        gradients: with the filler of their buckets, and its weights.
        activations, loss: None for a model that isn't ours.
        fence: the largest second shard during a transition to a neighbouring size, or a recovery at the same size.
        snapshots: two of its own and two of each protected rank's. In a world of one with standbys two, of the member
            in its own memory, or in that of its keeper.
        deltas: those between them.
        teacher: weights of the teacher of a distillation.
    """

    weights: int
    masters: int
    moments: int
    buffers: int
    kept: int
    gradients: int
    activations: int | None
    loss: int | None
    fence: int
    snapshots: int = 0
    deltas: int = 0
    teacher: int = 0
    process: int = PROCESS_BYTES

    @property
    def state(self) -> int:
        """The shard in the engine."""
        return self.weights + self.masters + self.moments + self.buffers + self.kept

    @property
    def engine(self) -> int:
        """Memory of an engine from its first step on."""
        return self.state + self.gradients

    @property
    def on_gpu(self) -> int:
        """Memory of a GPU that trains. Snapshots and the process are in the host's, and at a fence so is the old shard
        where the GPU has no room for two."""
        return self.computing + self.teacher

    @property
    def training(self) -> int:
        return self.computing + self.snapshots + self.deltas + self.teacher + self.process

    @property
    def computing(self) -> int:
        """An engine and what a step of it computes."""
        return self.engine + (self.activations or 0) + (self.loss or 0)

    @property
    def at_fence(self) -> int:
        """A shard without gradients, and a second one."""
        return self.state + self.fence

    @property
    def heap(self) -> int:
        """What a step or a fence takes, whichever is more. Snapshots have memory of their own."""
        return max(self.computing, self.at_fence)

    @property
    def first_snapshots(self) -> int:
        """One whole snapshot of its own, and one of each protected rank's: a new world's first ones, while the old
        world's stay until these are acknowledged. All others reuse the old world's memory
        (`orchestrator.state.buffers`)."""
        return self.snapshots // 2

    @property
    def peak(self) -> int:
        return self.heap + self.snapshots + self.deltas + self.first_snapshots + self.teacher + self.process


def plan_memory(job: JobSpec, state: StatePlan, size: int, ours: bool = True) -> MemoryPlan:
    """The memory of a worker in a world of `size`. Arguments as in `plan_job`."""
    job = with_longest_rows(job)
    placement = planned_placement(job, size)
    layout = layout_at(job, state, placement, imagined_world(0, size))
    seconds = [_second_shard(layout, next_layout(job, state, layout, placement, to)) for to in neighbours(job, size)]
    if size > 1:  # a failed worker may be replaced before the others continue
        seconds.append(int(layout.bytes_per_rank().max()))
    return _memory(job, state, layout, placement, max(seconds, default=0), ours)


def planned_placement(job: JobSpec, size: int) -> ExpertPlacement:
    """A placement in a world of `size` with all the copies of experts that the job allows, of any experts: with other
    loads other experts have them, and as many are on a worker."""
    balanced = ExpertPlacement.balanced(job.model.n_routed_experts, size)
    copies = min(job.experts.placement.num_redundant_experts, balanced.num_experts * (size - 1))
    if not copies:
        return balanced
    holders = [list(ranks) for ranks in balanced.holders]
    held = Counter(rank for ranks in holders for rank in ranks)
    by_turns = sorted(range(len(holders)), key=lambda expert: balanced.experts_of(holders[expert][0]).index(expert))
    for expert in (by_turns * (size - 1))[:copies]:
        others = [rank for rank in range(size) if rank not in holders[expert]]
        if others:  # the nearest of those with the fewest
            holders[expert].append(min(others, key=lambda rank: (held[rank], rank ^ holders[expert][0])))
            held[holders[expert][-1]] += 1
    return ExpertPlacement(len(holders), size, tuple(tuple(sorted(ranks)) for ranks in holders))


def with_longest_rows(job: JobSpec) -> JobSpec:
    """The job with its longest rows, which set memory and bytes of dispatch: its curriculum's, or both answers of
    a pair."""
    if job.data_format == PREFERENCE:
        longest = {"sequence_length": 2 * job.train.sequence_length}
    elif job.curriculum is not None:
        longest = {"sequence_length": longest_row(job.curriculum, job.train)}
    else:
        return job
    return job.model_copy(update={"train": job.train.model_copy(update=longest)})


def neighbours(job: JobSpec, size: int) -> list[int]:
    return [n for n in (size - 1, size + 1) if job.workers.min <= n <= job.workers.max]


def _memory(
    job: JobSpec, state: StatePlan, layout: StateLayout, placement: ExpertPlacement, fence: int, ours: bool
) -> MemoryPlan:
    fullest = int(layout.bytes_per_rank().argmax())
    held = _bytes_by_origin(layout, fullest)
    trained = held[Origin.GATHER, True]
    elements = trained // item_bytes(job.train)
    partition = 4 * sum(stop - start for start, stop in layout.updates_of(fullest).values())  # fp32, as masters are
    item = 8 if job.train.is_exact else 4
    own = item * elements  # in buckets, in fp32 or fp64; the last one of a step, or each micro-batch's, travels
    sent = (p for p in state.params if job.train.is_trained(p.name) and _is_shared(p, fullest, placement))
    shared = sum(item * p.numel for p in sent)
    under_way = min(shared, UNDER_WAY * item * capacity(job.communication, layout.world.size))
    gradients = own + under_way + (partition * item // 4 if job.train.zero_stage == 2 else 0)
    filler = int(filler_per_rank(layout.tensors, placement, job.communication)[fullest])
    gradients += filler * (item + item_bytes(job.train))  # of buckets: they have weights, too
    share = max(len(placement.experts_of(rank)) for rank in range(placement.world_size)) / job.model.n_routed_experts
    crowding = share * placement.world_size if placement.world_size > 1 else 0.0
    snapshots, deltas = _snapshot_bytes(job, layout, fullest)
    held_logits = 1 if job.distill is None else LOGITS_HELD
    if deltas:  # the newest step's gradients stay until they are copied
        deltas += partition
    return MemoryPlan(
        weights=trained + held[Origin.CONSTANT, True],
        masters=partition,  # fp32 weights are their own; ZeRO keeps its partition once more
        moments=held[Origin.UPDATE, False],
        buffers=held[Origin.COPY, True],
        kept=held[Origin.COPY, False],
        gradients=gradients,
        activations=activation_bytes(job.model, job.train, crowding) if ours else None,
        loss=loss_bytes(job.model, job.train, state.vocab_size, held_logits) if ours else None,
        fence=fence,
        snapshots=snapshots,
        deltas=deltas,
        teacher=0 if job.distill is None else item_bytes(job.train) * job.distill.teacher_parameters,
    )


def bytes_by_part(layout: StateLayout) -> dict[str, IntArray]:
    """[world size] bytes held by each rank, by the tensors' kind."""
    parts = np.array([name.partition("/")[0] for name in layout.names])
    tensor, start, stop, rank = layout.shards.T
    held: dict[str, IntArray] = {}
    for part in dict.fromkeys(parts.tolist()):
        ranks = np.zeros(layout.world.size, dtype=np.int64)
        mine = parts[tensor] == part
        np.add.at(ranks, rank[mine], ((stop - start) * layout.itemsize[tensor])[mine])
        for index, holders in enumerate(layout.holder_sets):
            whole = (parts == part) & (layout.sharing != Sharing.SHARDED) & (layout.holder_set == index)
            ranks[list(holders)] += int(np.sum(layout.numel[whole] * layout.itemsize[whole]))
        held[part] = ranks
    return held


def _bytes_by_origin(layout: StateLayout, rank: int) -> Counter[tuple[Origin, bool]]:
    """Bytes that a rank holds, by origin and whether they are of the model."""
    held: Counter[tuple[Origin, bool]] = Counter()
    for index, start, stop in layout.ranges_of(layout.world.members[rank]).tolist():
        tensor = layout.tensors[layout.names[index]]
        held[tensor.origin, of_model(tensor.name) is not None] += (stop - start) * tensor.item_bytes
    return held


def _snapshot_bytes(job: JobSpec, layout: StateLayout, rank: int) -> tuple[int, int]:
    """Bytes of two whole snapshots of a rank's own and two of the largest protected ranks possible, and of deltas. A
    lone rank protects none, and takes snapshots only beside a standby."""
    stand_by = job.workers.standby or job.workers.schedule  # those of a scheduled growth are kept warm for it
    if job.protection.interval is None or (layout.world.size < 2 and not stand_by):
        return 0, 0
    every = job.protection.whole_every(job.recovery.whole_every)
    ranks, copies = range(layout.world.size), job.protection.copies
    whole = 2 * _kept_bytes([SnapshotFormat.of(layout, other) for other in ranks], rank, copies)
    if every == 1:
        return whole, 0
    return whole, every * _kept_bytes([SnapshotFormat.of_delta(layout, other) for other in ranks], rank, copies)


def _kept_bytes(formats: Sequence[SnapshotFormat], rank: int, copies: int) -> int:
    """Bytes of a rank's own snapshot and of the largest ones that it may keep for others."""
    others = sorted(form.shared_bytes for form in formats) if len(formats) > 1 else []
    return formats[rank].total_bytes + sum(others[-copies:])


def _is_shared(param: ParamSpec, rank: int, placement: ExpertPlacement) -> bool:
    """Whether this rank and others hold the parameter, so that its gradients are sent."""
    if param.expert is None:
        return placement.world_size > 1
    replicas = placement.replica_set(param.expert, param.name)
    return rank in replicas and len(replicas) > 1


def next_layout(
    job: JobSpec, state: StatePlan, old: StateLayout, placement: ExpertPlacement, to_size: int
) -> StateLayout:
    world = imagined_world(1, to_size)
    if job.experts.placement.num_redundant_experts:  # which the next placement may have, too
        return layout_at(job, state, planned_placement(job, to_size), world)
    return layout_at(job, state, ExpertPlacement.rebalanced(placement, old.world, world), world)


def _second_shard(old: StateLayout, new: StateLayout) -> int:
    """Bytes of the largest new shard of a worker that holds an old one. Survivors come first."""
    both = min(old.world.size, new.world.size)
    return int(new.bytes_per_rank()[:both].max())


def layout_at(job: JobSpec, state: StatePlan, placement: ExpertPlacement, world: World) -> StateLayout:
    return training_layout(inventory(state.params, job, state.buffers), placement, world, job.communication)


def imagined_world(generation: int, size: int) -> World:
    return World(generation, tuple(f"w{number}" for number in range(size)))
