"""The parts of a transition that don't depend on the state.

`prepare` runs in the background while the old world trains: it connects the peers and the next world, makes the
transfer plan, and reserves memory for the new shard.
"""

from dataclasses import dataclass

from torch._C._distributed_c10d import Store

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.comm.transport.rendezvous import connect_store
from orchestrator.elastic.recovery_point import layout_at_recovery_point
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import Sharing
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.engine.process_groups import PendingGroups
from orchestrator.policy.estimate.worker_memory import bytes_by_part
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.worker.shard.shard import ShardFactory
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator
from orchestrator.worker.transition.reserved_memory import reserve, reserve_buffers


@dataclass(frozen=True)
class PreparedTransition:
    """All parts of a transition that don't depend on the state.

    Args:
        store: this plan's connection to the rendezvous store.
        meeting: the new world's connections; None for a worker that leaves.
        protection: connections to buddies in the new world; None where there are none.
        peers, transfer: None where state comes from the seed or a checkpoint.
        mapped: map of the old state where the new one has other experts; None where it has the same.
        replicated: names of the tensors that each holder has in full.
        shard_bytes: size of this worker's new shard; 0 for one that leaves.
    """

    plan: GenerationPlan
    store: Store
    meeting: PendingGroups | None = None
    protection: SnapshotReplicator | None = None
    peers: PeerGroup | None = None
    transfer: TransferPlan | None = None
    mapped: StateMap | None = None
    replicated: frozenset[str] = frozenset()
    shard_bytes: int = 0

    def close(self) -> None:
        """Close the connections, except those of an adopted world: peers blocked on this worker fail at once."""
        self.close_transfer()
        if self.protection is not None:
            self.protection.close()

    def close_transfer(self) -> None:
        """Close the connections that only the transition needs."""
        if self.meeting is not None:
            self.meeting.close()
        if self.peers is not None:
            self.peers.close()


def prepare(factory: ShardFactory, plan: GenerationPlan) -> PreparedTransition:
    """Connect the peers of a transition and the world after it, plan the transfer, and reserve memory for its shard.
    Collective over all involved workers.

    Raises:
        RuntimeError: a peer did not connect, or the store failed.
        OSError: the plan's store can't be reached.
    """
    # A separate connection: while one call waits for a key all others on it wait too, so a failed newcomer would delay
    # the next plan until the timeout.
    store = connect_store(plan.store_address.host, plan.store_address.port)
    source = plan.source
    peers = None
    if source is not None:
        peers = PeerGroup(store, plan.store_prefix + "/peers", plan.involved, factory.me, address=factory.address)
    meeting = factory.meet(store, plan) if factory.me in plan.world else None
    protection = factory.protect(store, plan) if factory.me in plan.world else None
    mapped = factory.state_map(plan)
    if source is None:
        return PreparedTransition(plan, store, meeting, protection, mapped=mapped)
    old = factory.layout(source.world, source.placement)
    if source.holders != source.world.members:
        old = layout_at_recovery_point(old, source.holders)
    if mapped is not None:
        old = mapped.relabelled(old)
    new = factory.layout(plan.world, plan.placement)
    transfer = TransferPlan.between(old, new)
    sizes = []
    if factory.me in plan.world:
        rank = plan.world.rank_of(factory.me)
        sizes = [int(ranks[rank]) for ranks in bytes_by_part(new).values()]
    # Where micro-batches grow until they fill the memory, none is left, and a micro-batch's use is being measured.
    if factory.device.type == "cpu" and not factory.spec.train.fits_memory:
        reserve(sizes)
        if protection is not None:
            reserve_buffers(protection.first_bytes, factory.snapshot_memory)
    replicated = frozenset(name for name, tensor in old.tensors.items() if tensor.sharing is Sharing.REPLICATED)
    return PreparedTransition(plan, store, meeting, protection, peers, transfer, mapped, replicated, sum(sizes))
