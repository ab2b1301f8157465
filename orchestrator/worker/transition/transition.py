"""Transition from one generation to the next, once it is prepared.

`make_transition` runs between the fence and activation: it builds the new shard in this same process and fills it from
the old shards, without disk or restart. The old shard stays readable until the controller has activated the new
generation, so a failed transition costs nothing: the old world is rebuilt from the state it still holds. After a
failure the old shards are those of the survivors and the snapshots that they keep for failed workers; the rest is the
same.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.elastic.expert_change import at
from orchestrator.elastic.recovery_point import Holding
from orchestrator.engine.base import noop
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_report import Handover
from orchestrator.state.digest import PartSums, StateDigests, change, differing
from orchestrator.state.fingerprint import StateFingerprint, whole
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.relabelling import relabelled
from orchestrator.state.transfer import execute_transfer
from orchestrator.worker.runtime.errors import DigestMismatch
from orchestrator.worker.shard.model_agreement import check_agreement
from orchestrator.worker.shard.shard import Shard, ShardFactory, TrainingProgress
from orchestrator.worker.transition.clone_changes import change_clones
from orchestrator.worker.transition.load_state import read_base, read_pretrained, read_state
from orchestrator.worker.transition.prepared_transition import PreparedTransition

ROUNDING = 1e-6  # how far sums of ranks' parts may move
UNKNOWN = torch.iinfo(torch.int64).min


@dataclass(frozen=True)
class Held:
    """State of a generation in this process's memory without an engine around it."""

    generation: int
    rank: int
    progress: TrainingProgress
    ranges: NamedRanges

    @property
    def holding(self) -> Holding:
        return Holding(self.generation, self.progress.step, self.rank)


def first_shard(
    factory: ShardFactory, prepared: PreparedTransition, sampler: str, between: Callable[[], None] = noop
) -> tuple[Shard, TrainingProgress, Handover]:
    """Build the first generation's shard from the seed, from a pretrained model, or from a checkpoint. Collective over
    its members.

    Args:
        between: called before each piece of the checkpoint; an exception from it ends the build.

    Raises:
        UsageError: the pretrained model's directory doesn't exist.
        CheckpointCorrupt, DataError: files can't be read, or belong to another model or corpus.
        EntrypointError: the members made different weights.
    """
    clock = _Clock()
    assert prepared.meeting is not None
    groups = prepared.meeting.adopt()
    clock.lap("connect")
    shard = factory.build(prepared.plan, groups)
    with closed_on_error(shard):
        progress = _fill_first(factory, prepared, shard, sampler, between)
    clock.lap("build")
    return shard, progress, _handover(prepared, progress, clock, identical=None)


def _fill_first(
    factory: ShardFactory, prepared: PreparedTransition, shard: Shard, sampler: str, between: Callable[[], None]
) -> TrainingProgress:
    plan = prepared.plan
    progress, model, engine = TrainingProgress(-1, 0, sampler), factory.spec.model, shard.engine
    if plan.restore is None and (model.init_from is None or model.upcycle):  # whose routers are in no file
        shard.model.init_weights(factory.spec.train.seed)
        if not model.is_native:
            check_agreement(shard.model, shard.groups.exchange)
    elif model.lora is not None:
        shard.model.init_adapters(factory.spec.train.seed)
    engine.on_weights_initialized()  # also for state that the files lack
    if plan.restore is not None:
        ranges, rank, size = engine.ranges(), shard.rank, plan.world.size
        tensors = factory.state(plan.experts.num_experts).tensors
        read_base(model, tensors, ranges)
        progress = read_state(plan.restore, ranges, tensors, sampler, rank, size, between, prepared.mapped)
        _change_clones(factory, prepared, shard, progress.step)
    elif model.init_from is not None:
        read_pretrained(model, engine.ranges())
    engine.on_state_loaded(progress.num_updates)
    return progress


@contextmanager
def closed_on_error(shard: Shard | None) -> Iterator[None]:
    """Close the engine of a new shard after an error: its weights and groups would stay for ever otherwise."""
    try:
        yield
    except BaseException:
        if shard is not None:
            shard.engine.close()
        raise


def make_transition(
    factory: ShardFactory,
    prepared: PreparedTransition,
    held: Held | None,
    progress: TrainingProgress,
    recorded: StepRecord | None,
) -> tuple[Shard | None, Handover]:
    """Build the new shard and fill it. Collective over the old and the new members.

    Args:
        held: this worker's old shard; None for a newcomer. Only read.
        progress: training progress at the fence.
        recorded: record of the state's step; None if it isn't known here.

    Returns:
        the new shard (None for a worker that leaves), not yet activated, and measurements of the transition.

    Raises:
        RuntimeError: a peer failed. `held` is untouched.
        DigestMismatch: the state differs from the digest in the step's record. Likewise, and on all workers.
    """
    plan, peers, transfer = prepared.plan, prepared.peers, prepared.transfer
    assert peers is not None and transfer is not None
    held_ranges = held.ranges if held is not None else None
    old = held_ranges if prepared.mapped is None or held_ranges is None else relabelled(held_ranges, prepared.mapped)
    clock = _Clock()
    # Sums of ranks' parts are rounded, so a digest of bits can't verify them.
    tensors = factory.state(plan.experts.num_experts).tensors
    adds_up = dict(zip(transfer.names, transfer.accumulates, strict=True))
    whole_names = [name for name, adds in adds_up.items() if not (adds or tensors[name].is_base)]
    partial = [name for name, adds in adds_up.items() if adds]
    before = StateDigests(whole_names, prepared.replicated, old)
    sums = PartSums(partial, old)
    clock.lap("digest")
    peers.barrier()  # no worker builds before all are past the fence; a failed newcomer makes it fail at once
    groups = prepared.meeting.adopt() if prepared.meeting is not None else None
    clock.lap("connect")
    shard = factory.build(plan, groups) if groups is not None else None
    new = shard.engine.ranges() if shard is not None else None
    clock.lap("build")
    moved = 0.0
    with closed_on_error(shard):
        execute_transfer(transfer, factory.me, old, new, peers)
        if new is not None:
            read_base(factory.spec.model, tensors, new, old)
        if shard is not None:
            shard.engine.on_state_loaded(progress.num_updates)
        clock.lap("transfer")
        after = StateDigests(whole_names, prepared.replicated, new)
        if partial:
            moved = change(sums, PartSums(partial, new), peers)
        identical = not differing(whole_names, before, after, peers) and moved <= ROUNDING
        if factory.spec.train.is_exact and plan.source is not None and not plan.source.is_changed:
            _check_record(_fingerprint(factory, plan, shard, held_ranges), recorded, peers)
        clock.lap("digest")
        if shard is not None and _change_clones(factory, prepared, shard, progress.step):
            shard.engine.on_state_loaded(progress.num_updates)
    clock.lap("transfer")
    return shard, _handover(prepared, progress, clock, identical, moved)


def _change_clones(factory: ShardFactory, prepared: PreparedTransition, shard: Shard, step: int) -> bool:
    """Change clones if that is wanted. Returns whether it was."""
    mapped = prepared.mapped
    if mapped is None or mapped.change.is_exact:
        return False
    known = replace(mapped, change=at(mapped.change, step + 1))
    change_clones(shard.engine.ranges(), known, factory.spec.train.seed)
    return True


def _fingerprint(
    factory: ShardFactory, plan: GenerationPlan, shard: Shard | None, held: NamedRanges | None
) -> StateFingerprint | None:
    """The fingerprint of the state, as its record has it: of the new shard, or of the old one where it has other
    experts."""
    if plan.change is None or plan.source is None:
        return shard.fingerprint(0) if shard is not None else None
    return None if held is None else StateFingerprint(held, factory.layout(plan.source.world, plan.source.placement))


def _check_record(fingerprint: StateFingerprint | None, recorded: StepRecord | None, peers: PeerGroup) -> None:
    """Compare the state with the digest from when its step was done, which may be long ago for a snapshot. Collective;
    passes where no record has a digest. Raises DigestMismatch."""
    now = int(fingerprint.look().sum()) if fingerprint is not None else 0
    expected = int(whole(recorded.state.digests), 16) if recorded is not None and recorded.state.digests else None
    found = torch.from_numpy(np.array([now], dtype=np.uint64).view(np.int64).copy())
    known = torch.tensor([UNKNOWN if expected is None else expected - (expected >> 63 << 64)])
    peers.reduce(found, dist.ReduceOp.SUM)
    peers.reduce(known, dist.ReduceOp.MAX)
    if known.item() not in (UNKNOWN, found.item()):
        place = f"step {recorded.step}" if recorded is not None else "the transition"
        raise DigestMismatch(f"the state after {place} is no longer what it was when the step was done")


class _Clock:
    """Time spent per phase, in seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self._last
        self._last = now


def _handover(
    prepared: PreparedTransition, progress: TrainingProgress, clock: _Clock, identical: bool | None, moved: float = 0.0
) -> Handover:
    peers = prepared.peers
    return Handover(
        generation=prepared.plan.generation,
        step=progress.step,
        connect_s=clock.spent.get("connect", 0.0),
        build_s=clock.spent.get("build", 0.0),
        transfer_s=clock.spent.get("transfer", 0.0),
        digest_s=clock.spent.get("digest", 0.0),
        sent_bytes=peers.sent_bytes if peers is not None else 0,
        received_bytes=peers.received_bytes if peers is not None else 0,
        state_identical=identical,
        residual_error=moved,
    )
