"""From one generation to the next, in two parts.

`prepare` runs in the background while the old world trains: it connects the peers and the world to come, makes the
plan, and has memory for the new shard. `move` runs between the fence and activation: it builds the new shard in this
same process and fills it from the old shards, no disk and no restart. The old shard stays readable until the controller
has activated the new generation, so a move that fails costs nothing: the old world is rebuilt from what it still holds.
After a loss the old shards are those of the survivors and the snapshots that they keep for the dead; the rest is the
same.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.comm.transport.rendezvous import connect_store
from orchestrator.elastic.recovery_point import layout_at_recovery_point
from orchestrator.elastic.state_layout import Kind
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.engine.base import noop
from orchestrator.engine.process_groups import PendingGroups
from orchestrator.policy.estimate.job_plan import bytes_by_part
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import GenerationPlan, Handover, StepRecord
from orchestrator.state.digest import PartSums, StateDigests, change, differing
from orchestrator.state.fingerprint import whole
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.transfer import execute_transfer
from orchestrator.worker.runtime.errors import DigestMismatch
from orchestrator.worker.runtime.reserved_memory import reserve
from orchestrator.worker.shard.model_agreement import check_agreement
from orchestrator.worker.shard.shard import Progress, Shard, ShardFactory
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator
from orchestrator.worker.transition.load_state import read_pretrained, read_state

ASK_AGAIN_S = 0.01
ROUNDING = 1e-6  # what sums of ranks' parts may move by
UNKNOWN = torch.iinfo(torch.int64).min
TOLD_RECORDS = 256  # finished steps that newcomers hear of, in case that only they are left to tell them


@dataclass(frozen=True)
class Held:
    """State of a generation that lies in this process's memory without an engine around it."""

    generation: int
    rank: int
    progress: Progress
    ranges: NamedRanges


@dataclass(frozen=True)
class FenceState:
    """Where training stood at a fence, and the newest steps up to it."""

    progress: Progress
    records: tuple[StepRecord, ...]


@dataclass(frozen=True)
class PreparedTransition:
    """Everything for a move that doesn't depend on the state.

    Args:
        store: this plan's connection to the rendezvous store.
        meeting: the new world's connections; None for a worker that leaves.
        protection: to and from the buddies of the new world; None where there are none.
        peers, transfer: None where state comes from the seed or a checkpoint.
        replicated: names of the tensors of which each holder has all.
    """

    plan: GenerationPlan
    store: Store
    meeting: PendingGroups | None = None
    protection: SnapshotReplicator | None = None
    peers: PeerGroup | None = None
    transfer: TransferPlan | None = None
    replicated: frozenset[str] = frozenset()

    def close(self) -> None:
        """Close the connections, those of an adopted world apart: peers blocked on this worker fail at once."""
        self.close_transfer()
        if self.protection is not None:
            self.protection.close()

    def close_transfer(self) -> None:
        """Close what only the move needs."""
        if self.meeting is not None:
            self.meeting.close()
        if self.peers is not None:
            self.peers.close()


def prepare(factory: ShardFactory, plan: GenerationPlan) -> PreparedTransition:
    """Connect the peers of a move and the world after it, plan the move, and have memory for its shard. Collective over
    all who are involved.

    Raises:
        RuntimeError: a peer did not come, or the store died.
        OSError: the plan's store is not there.
    """
    # By a connection of its own: while one waits for a key all other calls on it wait too, so a newcomer that died
    # would hold up the next plan until the timeout.
    store = connect_store(plan.store_address.host, plan.store_address.port)
    source = plan.source
    peers = None
    if source is not None:
        peers = PeerGroup(store, plan.store_prefix + "/peers", plan.involved, factory.me, address=factory.address)
    meeting = factory.meet(store, plan) if factory.me in plan.world else None
    protection = factory.protect(store, plan) if factory.me in plan.world else None
    if source is None:
        return PreparedTransition(plan, store, meeting, protection)
    old = factory.layout(source.world, source.placement)
    if source.holders != source.world.members:
        old = layout_at_recovery_point(old, source.holders)
    new = factory.layout(plan.world, plan.placement)
    transfer = TransferPlan.between(old, new)
    # Where micro-batches grow until they fill the memory, none is left, and what a micro-batch takes is being measured.
    if factory.me in plan.world and factory.device.type == "cpu" and not factory.spec.train.fits_memory:
        rank = plan.world.rank_of(factory.me)
        reserve(int(ranks[rank]) for ranks in bytes_by_part(new).values())
    replicated = frozenset(n for n, kind in zip(old.names, old.kind, strict=True) if kind == Kind.REPLICATED)
    return PreparedTransition(plan, store, meeting, protection, peers, transfer, replicated)


def announce(prepared: PreparedTransition, progress: Progress, records: Sequence[StepRecord]) -> None:
    """Tell the newcomers that the fence is reached, and where training stands. RuntimeError: the store died."""
    told = {"progress": progress.to_json(), "records": [to_plain(r) for r in records[-TOLD_RECORDS:]]}
    prepared.store.set(prepared.plan.store_prefix + "/fence", json.dumps(told))


def announced(prepared: PreparedTransition, timeout_s: float) -> FenceState | None:
    """Where training stood at the fence; None if it isn't reached within `timeout_s`. Raises RuntimeError if the store
    died."""
    store, key = prepared.store, prepared.plan.store_prefix + "/fence"
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):  # asked again and again, since a wait that times out logs an error each time
        if time.monotonic() > deadline:
            return None
        time.sleep(ASK_AGAIN_S)
    told = json.loads(store.get(key))
    records = tuple(from_plain(StepRecord, plain) for plain in told["records"])
    return FenceState(Progress.from_json(told["progress"]), records)


def first_shard(
    factory: ShardFactory, prepared: PreparedTransition, sampler: str, between: Callable[[], None] = noop
) -> tuple[Shard, Progress, Handover]:
    """The first generation's shard: made from the seed, read from another's model, or from a checkpoint. Collective
    over its members.

    Args:
        between: called before each piece of the checkpoint; what it raises ends it.

    Raises:
        UsageError: the directory of another's model isn't there.
        CheckpointCorrupt, DataError: what is to be read can't be read, or belongs to another model or corpus.
        EntrypointError: the members made different weights.
    """
    clock = _Clock()
    assert prepared.meeting is not None
    groups = prepared.meeting.adopt()
    clock.lap("connect")
    shard = factory.build(prepared.plan, groups)
    with _closed_if_not_filled(shard):
        progress = _fill_first(factory, prepared.plan, shard, sampler, between)
    clock.lap("build")
    return shard, progress, _handover(prepared, progress, clock, identical=None)


def _fill_first(
    factory: ShardFactory, plan: GenerationPlan, shard: Shard, sampler: str, between: Callable[[], None]
) -> Progress:
    progress = Progress(-1, 0, sampler)
    if plan.restore is not None:
        shard.engine.on_weights_initialized()  # for what the checkpoint doesn't have
        progress = read_state(plan.restore, shard.engine.ranges(), sampler, shard.rank, plan.world.size, between)
    elif factory.spec.model.init_from is not None:
        read_pretrained(factory.spec.model, shard.engine.ranges())
    else:
        shard.model.init_weights(factory.spec.train.seed)
        if factory.spec.model.entrypoint is not None:
            check_agreement(shard.model, shard.groups.exchange)
        shard.engine.on_weights_initialized()
        return progress
    shard.engine.on_state_loaded(progress.num_updates)
    return progress


@contextmanager
def _closed_if_not_filled(shard: Shard | None) -> Iterator[None]:
    """An engine that nobody will close otherwise is closed, or its weights and groups would stay for ever."""
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
    progress: Progress,
    recorded: StepRecord | None,
) -> tuple[Shard | None, Handover]:
    """Build the new shard and fill it. Collective over the old and the new members.

    Args:
        held: this worker's old shard; None for a newcomer. Only read.
        progress: where training stood at the fence.
        recorded: the step that the state is of; None if it isn't known here.

    Returns:
        the new shard (None for a worker that leaves), not yet activated, and what the move took.

    Raises:
        RuntimeError: a peer was lost. `held` is untouched.
        StateDoubtful: the state is not the one that the step's record tells of. Likewise, and on all workers.
    """
    plan, peers, transfer = prepared.plan, prepared.peers, prepared.transfer
    assert peers is not None and transfer is not None
    old = held.ranges if held is not None else None
    clock = _Clock()
    # What ranks' parts add up to is no bit pattern that a digest could see: sums are rounded.
    whole_names = [name for name, adds in zip(transfer.names, transfer.accumulates, strict=True) if not adds]
    partial = [name for name, adds in zip(transfer.names, transfer.accumulates, strict=True) if adds]
    before = StateDigests(whole_names, prepared.replicated, old) if plan.verify_digests else None
    sums = PartSums(partial, old)
    clock.lap("digest")
    peers.barrier()  # nobody builds before all are past the fence; a newcomer that died makes it fail at once
    groups = prepared.meeting.adopt() if prepared.meeting is not None else None
    clock.lap("connect")
    shard = factory.build(plan, groups) if groups is not None else None
    new = shard.engine.ranges() if shard is not None else None
    clock.lap("build")
    identical, moved = None, 0.0
    with _closed_if_not_filled(shard):
        execute_transfer(transfer, factory.me, old, new, peers)
        if shard is not None:
            shard.engine.on_state_loaded(progress.num_updates)
        clock.lap("transfer")
        if before is not None:
            after = StateDigests(whole_names, prepared.replicated, new)
            moved = change(sums, PartSums(partial, new), peers) if partial else 0.0
            identical = not differing(whole_names, before, after, peers) and moved <= ROUNDING
        if factory.spec.train.is_exact:
            _check_record(shard, recorded, peers)
    clock.lap("digest")
    return shard, _handover(prepared, progress, clock, identical, moved)


def _check_record(shard: Shard | None, recorded: StepRecord | None, peers: PeerGroup) -> None:
    """The same state as when the step was done, which may be long ago for a snapshot. Collective; where no record tells
    a digest it says nothing. Raises StateDoubtful."""
    witness = shard.witness(0) if shard is not None else None
    now = int(witness.look().sum()) if witness is not None else 0
    told = int(whole(recorded.digests), 16) if recorded is not None and recorded.digests else None
    found = torch.from_numpy(np.array([now], dtype=np.uint64).view(np.int64).copy())
    known = torch.tensor([UNKNOWN if told is None else told - (told >> 63 << 64)])
    peers.reduce(found, dist.ReduceOp.SUM)
    peers.reduce(known, dist.ReduceOp.MAX)
    if known.item() not in (UNKNOWN, found.item()):
        step = recorded.step if recorded is not None else "the move"
        raise DigestMismatch(f"the state after step {step} is no longer what it was when the step was done")


class _Clock:
    """Where the time went, in seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self._last
        self._last = now


def _handover(
    prepared: PreparedTransition, progress: Progress, clock: _Clock, identical: bool | None, moved: float = 0.0
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
