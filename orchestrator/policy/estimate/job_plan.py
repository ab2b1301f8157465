"""Plan of a job at every world size that it may have: memory per worker by part, bytes per step by kind, and the stall
of a rescale. Pure: from the job and the list of the model's parameters.

Exact: weights, masters, moments and buffers, which follow from the layout; parameters gathered, gradients reduced, and
bytes moved at a rescale. Estimates: gradients' buffers, activations and the loss, from the memory that buckets and
autograd were measured to keep; dispatch and combine, which take experts as equally popular; and the stall, whose
constants were measured on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.elastic.bucket_partition import UNDER_WAY, capacity
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.param_spec import ParamSpec
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import IntArray, StateLayout, TensorKind, training_layout
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.policy.estimate.activations import activation_bytes, item_bytes, loss_bytes
from orchestrator.policy.estimate.curriculum_stages import longest_row
from orchestrator.policy.estimate.traffic import TrafficPlan, num_micro_batches, traffic_of
from orchestrator.sampling.micro_batches import micro_batches_of
from orchestrator.spec.job import JobSpec

PROCESS_BYTES = 320_000_000  # its own memory and its share of libraries' pages, once torch and DeepSpeed are imported
# Constants of the stall, from `python -m benchmarks.rescale` and the demo on 2 cores, over loopback.
FIXED_STALL_S = 0.08  # vote, engine, activation
DIGEST_S_PER_ELEMENT = 2.5e-9  # wall clock with all cores busy; the old shard and the new one
LINK_BYTES_PER_S = 0.5e9


@dataclass(frozen=True)
class StatePlan:
    """The parameters of a model in the engine's order, and its buffers as (name, elements)."""

    params: tuple[ParamSpec, ...]
    buffers: tuple[tuple[str, int], ...]
    vocab_size: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the worker that holds most.

    Args:
        kept: state of gradient compression.
        activations, loss: None for a model that isn't ours.
        fence: the largest second shard during a transition to a neighbouring size, or a recovery at the same size.
        snapshots: two of its own and two of its protected rank's.
        deltas: those between them.
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
    def training(self) -> int:
        work = (self.activations or 0) + (self.loss or 0)
        return self.engine + work + self.snapshots + self.deltas + self.process

    @property
    def at_fence(self) -> int:
        """Memory at a fence: without activations, loss and gradients, with a second shard."""
        return self.state + self.fence + self.snapshots + self.deltas + self.process

    @property
    def after_fence(self) -> int:
        """Memory at the first step of a new world: its first whole snapshots are taken, and the old world's stay until
        they are acknowledged. All others reuse the old world's buffers (`orchestrator.state.buffers`)."""
        return self.training + self.first_snapshots

    @property
    def first_snapshots(self) -> int:
        """One whole snapshot of its own, and one of its protected rank's."""
        return self.snapshots // 2

    @property
    def peak(self) -> int:
        return max(self.at_fence, self.after_fence)


@dataclass(frozen=True)
class RescalePlan:
    """A rescale to `to_size`: bytes moved in all, by the worker that sends and receives most, and the stall."""

    to_size: int
    moved_bytes: int
    busiest_bytes: int
    stall_s: float


@dataclass(frozen=True)
class WorldPlan:
    world_size: int
    experts: tuple[int, ...]  # held by each rank
    micro_batches: tuple[int, ...]  # of each rank
    memory: MemoryPlan
    traffic: TrafficPlan
    rescales: tuple[RescalePlan, ...]


@dataclass(frozen=True)
class JobPlan:
    """A plan for each world size, ascending."""

    num_parameters: int
    vocab_size: int
    worlds: tuple[WorldPlan, ...]


def plan_job(job: JobSpec, state: StatePlan, ours: bool = True) -> JobPlan:
    """The plan for every world size of the job.

    Args:
        ours: the model is the product's own, so the activations that its forward pass keeps are known.
    """
    job = _with_longest_rows(job)
    sizes = range(job.workers.min, job.workers.max + 1)
    return JobPlan(
        num_parameters=sum(param.numel for param in state.params),
        vocab_size=state.vocab_size,
        worlds=tuple(_plan_world(job, state, size, ours) for size in sizes),
    )


def plan_memory(job: JobSpec, state: StatePlan, size: int, ours: bool = True) -> MemoryPlan:
    """The memory of a worker in a world of `size`. Arguments as in `plan_job`."""
    job = _with_longest_rows(job)
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, size)
    layout = _layout(job, state, placement, _world(0, size))
    seconds = [_second_shard(layout, _next_layout(job, state, layout, placement, to)) for to in _neighbours(job, size)]
    if size > 1:  # a failed worker may be replaced before the others continue
        seconds.append(int(layout.bytes_per_rank().max()))
    return _memory(job, state, layout, placement, max(seconds, default=0), ours)


def _plan_world(job: JobSpec, state: StatePlan, size: int, ours: bool) -> WorldPlan:
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, size)
    layout = _layout(job, state, placement, _world(0, size))
    return WorldPlan(
        world_size=size,
        experts=tuple(len(placement.experts_of(rank)) for rank in range(size)),
        micro_batches=tuple(len(micro_batches_of(rank, size, num_micro_batches(job))) for rank in range(size)),
        memory=plan_memory(job, state, size, ours),
        traffic=traffic_of(job, state.params, placement, _shared_bytes(job, layout)),
        rescales=tuple(_plan_rescale(job, state, layout, placement, to) for to in _neighbours(job, size)),
    )


def _with_longest_rows(job: JobSpec) -> JobSpec:
    """The job with its curriculum's longest rows, which set memory and bytes of dispatch."""
    if job.curriculum is None:
        return job
    longest = {"sequence_length": longest_row(job.curriculum, job.train)}
    return job.model_copy(update={"train": job.train.model_copy(update=longest)})


def _neighbours(job: JobSpec, size: int) -> list[int]:
    return [n for n in (size - 1, size + 1) if job.workers.min <= n <= job.workers.max]


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(
    job: JobSpec, state: StatePlan, layout: StateLayout, placement: ExpertPlacement, fence: int, ours: bool
) -> MemoryPlan:
    fullest = int(layout.bytes_per_rank().argmax())
    held = {part: int(ranks[fullest]) for part, ranks in bytes_by_part(layout).items()}
    partition = held["exp_avg"]  # fp32, as masters are
    weights = held["param"] // item_bytes(job.train)  # elements
    item = 8 if job.train.is_exact else 4
    own = item * weights  # in buckets, in fp32 or fp64; the last one of a step, or each micro-batch's, travels
    shared = sum(item * p.numel for p in state.params if _is_shared(p, fullest, placement))
    under_way = min(shared, UNDER_WAY * item * capacity(job.communication, layout.world.size))
    gradients = own + under_way + (partition * item // 4 if job.train.zero_stage == 2 else 0)
    share = max(len(placement.experts_of(rank)) for rank in range(placement.world_size)) / job.model.n_routed_experts
    crowding = share * placement.world_size if placement.world_size > 1 else 0.0
    snapshots, deltas = _snapshot_bytes(job, layout, fullest)
    if deltas:  # the newest step's gradients stay until they are copied
        deltas += partition
    return MemoryPlan(
        weights=held["param"],
        masters=held.get("master", partition),  # fp32 weights are their own; ZeRO keeps its partition once more
        moments=held["exp_avg"] + held["exp_avg_sq"],
        buffers=held.get("buffer", 0),
        kept=sum(held.get(part, 0) for part in ("residual", "velocity", "powersgd")),
        gradients=gradients,
        activations=activation_bytes(job.model, job.train, crowding) if ours else None,
        loss=loss_bytes(job.model, job.train, state.vocab_size) if ours else None,
        fence=fence,
        snapshots=snapshots,
        deltas=deltas,
    )


def bytes_by_part(layout: StateLayout) -> dict[str, IntArray]:
    """[world size] bytes held by each rank, by part: `param/`, `master/` and so on."""
    parts = np.array([name.partition("/")[0] for name in layout.names])
    tensor, start, stop, rank = layout.shards.T
    held: dict[str, IntArray] = {}
    for part in dict.fromkeys(parts.tolist()):
        ranks = np.zeros(layout.world.size, dtype=np.int64)
        mine = parts[tensor] == part
        np.add.at(ranks, rank[mine], ((stop - start) * layout.itemsize[tensor])[mine])
        for index, holders in enumerate(layout.holder_sets):
            whole = (parts == part) & (layout.kind != TensorKind.SHARDED) & (layout.holder_set == index)
            ranks[list(holders)] += int(np.sum(layout.numel[whole] * layout.itemsize[whole]))
        held[part] = ranks
    return held


# -- snapshots ---------------------------------------------------------------------------------------------------------


def _shared_bytes(job: JobSpec, layout: StateLayout) -> int:
    """Snapshot bytes that all ranks together send, per step."""
    interval = job.protection.interval
    if interval is None or layout.world.size < 2:
        return 0
    ranks, every = range(layout.world.size), job.protection.whole_every(job.recovery.whole_every)
    whole = sum(SnapshotFormat.of(layout, rank).shared_bytes for rank in ranks)
    deltas = sum(SnapshotFormat.of_delta(layout, rank).shared_bytes for rank in ranks) if every > 1 else 0
    return (whole + (every - 1) * deltas) // (every * interval)


def _snapshot_bytes(job: JobSpec, layout: StateLayout, rank: int) -> tuple[int, int]:
    """Bytes of two whole snapshots of a rank's own and two of the largest protected rank possible, and of deltas."""
    if job.protection.interval is None or layout.world.size < 2:
        return 0, 0
    every = job.protection.whole_every(job.recovery.whole_every)
    whole = 2 * _kept_bytes([SnapshotFormat.of(layout, other) for other in range(layout.world.size)], rank)
    if every == 1:
        return whole, 0
    return whole, every * _kept_bytes([SnapshotFormat.of_delta(layout, r) for r in range(layout.world.size)], rank)


def _kept_bytes(formats: Sequence[SnapshotFormat], rank: int) -> int:
    return formats[rank].total_bytes + max(form.shared_bytes for form in formats)


def _is_shared(param: ParamSpec, rank: int, placement: ExpertPlacement) -> bool:
    """Whether this rank and others hold the parameter, so that its gradients are sent."""
    if param.expert is None:
        return placement.world_size > 1
    replicas = placement.replica_set(param.expert)
    return rank in replicas and len(replicas) > 1


# -- rescale -----------------------------------------------------------------------------------------------------------


def _plan_rescale(
    job: JobSpec, state: StatePlan, old: StateLayout, placement: ExpertPlacement, to_size: int
) -> RescalePlan:
    new = _next_layout(job, state, old, placement, to_size)
    plan = TransferPlan.between(old, new)
    num_bytes = (plan.moves[:, 2] - plan.moves[:, 1]) * plan.itemsize[plan.moves[:, 0]]
    busy = np.zeros(len(plan.workers), dtype=np.int64)
    np.add.at(busy, plan.moves[:, 3], num_bytes)
    np.add.at(busy, plan.moves[:, 4], num_bytes)
    digested = (int(old.bytes_per_rank().max()) + int(new.bytes_per_rank().max())) / 4  # elements, nearly
    busiest = int(busy.max())
    stall_s = FIXED_STALL_S + digested * DIGEST_S_PER_ELEMENT + busiest / LINK_BYTES_PER_S
    return RescalePlan(to_size, plan.moved_bytes, busiest, round(stall_s, 3))


def _next_layout(
    job: JobSpec, state: StatePlan, old: StateLayout, placement: ExpertPlacement, to_size: int
) -> StateLayout:
    world = _world(1, to_size)
    return _layout(job, state, ExpertPlacement.rebalanced(placement, old.world, world), world)


def _second_shard(old: StateLayout, new: StateLayout) -> int:
    """Bytes of the largest new shard of a worker that holds an old one. Survivors come first."""
    both = min(old.world.size, new.world.size)
    return int(new.bytes_per_rank()[:both].max())


def _layout(job: JobSpec, state: StatePlan, placement: ExpertPlacement, world: World) -> StateLayout:
    mixed = job.train.precision == "bf16"
    return training_layout(state.params, placement, world, mixed, state.buffers, job.communication)


def _world(generation: int, size: int) -> World:
    return World(generation, tuple(f"w{number}" for number in range(size)))
