"""Plan of a job at every world size that it may have: memory per worker by part, bytes per step by kind, and the stall
of a rescale. Pure: from the job and the list of the model's parameters.

Exact: weights, masters, moments and buffers, which follow from the layout; parameters gathered, gradients reduced, and
bytes moved at a rescale. Estimates: gradients' buffers, activations and the loss, from the memory that buckets and
autograd were measured to keep; dispatch and combine, which take experts as equally popular; and the stall, whose
constants were measured on two cores.
"""

from dataclasses import dataclass

import numpy as np

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.policy.estimate.traffic import TrafficPlan, num_micro_batches, traffic_of
from orchestrator.policy.estimate.worker_memory import (
    MemoryPlan,
    StatePlan,
    imagined_world,
    layout_at,
    neighbours,
    next_layout,
    plan_memory,
    planned_placement,
    with_longest_rows,
)
from orchestrator.sampling.micro_batches import micro_batches_of
from orchestrator.spec.job import JobSpec

# Constants of the stall, from `python -m benchmarks.rescale` and the demo on 2 cores, over loopback.
FIXED_STALL_S = 0.08  # vote, engine, activation
DIGEST_S_PER_ELEMENT = 2.5e-9  # wall clock with all cores busy; the old shard and the new one
LINK_BYTES_PER_S = 0.5e9


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
    """A plan for each world size, ascending.

    Args:
        num_trained: of the parameters, those that are trained.
    """

    num_parameters: int
    num_trained: int
    vocab_size: int
    worlds: tuple[WorldPlan, ...]


def plan_job(job: JobSpec, state: StatePlan, ours: bool = True) -> JobPlan:
    """The plan for every world size of the job.

    Args:
        ours: the model is the product's own, so the activations that its forward pass keeps are known.
    """
    sizes = range(job.workers.min, job.workers.max + 1)
    return JobPlan(
        num_parameters=sum(param.numel for param in state.params),
        num_trained=sum(param.numel for param in state.params if job.train.is_trained(param.name)),
        vocab_size=state.vocab_size,
        worlds=tuple(_plan_world(job, state, size, ours) for size in sizes),
    )


def _plan_world(job: JobSpec, state: StatePlan, size: int, ours: bool) -> WorldPlan:
    placement = planned_placement(job, size)
    layout = layout_at(job, state, placement, imagined_world(0, size))
    return WorldPlan(
        world_size=size,
        experts=tuple(len(placement.experts_of(rank)) for rank in range(size)),
        micro_batches=tuple(len(micro_batches_of(rank, size, num_micro_batches(job))) for rank in range(size)),
        memory=plan_memory(job, state, size, ours),
        traffic=traffic_of(with_longest_rows(job), state.params, placement, _shared_bytes(job, layout)),
        rescales=tuple(_plan_rescale(job, state, layout, placement, to) for to in neighbours(job, size)),
    )


def _shared_bytes(job: JobSpec, layout: StateLayout) -> int:
    """Snapshot bytes that all ranks together send, per step."""
    interval = job.protection.interval
    if interval is None or layout.world.size < 2:
        return 0
    ranks, every = range(layout.world.size), job.protection.whole_every(job.recovery.whole_every)
    whole = sum(SnapshotFormat.of(layout, rank).shared_bytes for rank in ranks)
    deltas = sum(SnapshotFormat.of_delta(layout, rank).shared_bytes for rank in ranks) if every > 1 else 0
    return job.protection.copies * (whole + (every - 1) * deltas) // (every * interval)


def _plan_rescale(
    job: JobSpec, state: StatePlan, old: StateLayout, placement: ExpertPlacement, to_size: int
) -> RescalePlan:
    new = next_layout(job, state, old, placement, to_size)
    plan = TransferPlan.between(old, new)
    num_bytes = (plan.moves[:, 2] - plan.moves[:, 1]) * plan.itemsize[plan.moves[:, 0]]
    busy = np.zeros(len(plan.workers), dtype=np.int64)
    np.add.at(busy, plan.moves[:, 3], num_bytes)
    np.add.at(busy, plan.moves[:, 4], num_bytes)
    digested = (int(old.bytes_per_rank().max()) + int(new.bytes_per_rank().max())) / 4  # elements, nearly
    busiest = int(busy.max())
    stall_s = FIXED_STALL_S + digested * DIGEST_S_PER_ELEMENT + busiest / LINK_BYTES_PER_S
    return RescalePlan(to_size, plan.moved_bytes, busiest, round(stall_s, 3))
