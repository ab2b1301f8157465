"""Snapshots sent over real sockets: to a buddy in both directions, and from a lone member to its keeper."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from orchestrator.comm.transport.stream import StreamClosed
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.protocol.messages import GenerationPlan, StoreAddress
from orchestrator.state.snapshot_store import RankSnapshots, SnapshotStore
from orchestrator.worker.shard.snapshot_receiver import SnapshotReceiver
from orchestrator.worker.shard.snapshot_replicator import SnapshotReplicator, meet_buddies, meet_member
from orchestrator.worker.shard.snapshot_sender import SnapshotSender
from tests.unit.worker.keeper_pair import LOOPBACK, WAIT_S, KeeperPair, layout_of, record_of, shard_of


@pytest.fixture
def pair() -> Iterator[KeeperPair]:
    pair = KeeperPair()
    pair.member.start(SnapshotStore())
    yield pair
    pair.close()


def test_a_keeper_has_the_whole_state_and_the_records_up_to_it(pair: KeeperPair) -> None:
    for step in (5, 6):
        pair.take(step)
        pair.member.sender.acknowledged()
    assert pair.kept.steps() == (5, 6)
    held = pair.kept.state(6)
    assert held.holding == Holding(4, 6, 0) and held.note == "note 6"
    wanted = {name for name, _ in shard_of(pair.layout, 0, 0.0)}
    assert set(held.ranges.names()) == wanted and all(bool((r.data == 6).all()) for _, r in held.ranges)
    assert pair.records == [record_of(step) for step in (4, 5, 6)]
    assert pair.member.cost_s() > 0


def test_a_member_notices_that_its_keeper_is_gone(pair: KeeperPair) -> None:
    pair.take(5)
    pair.member.sender.acknowledged()
    pair.receiver.shut()
    pair.take(6)
    pair.member.sender.copied()  # the shard may change all the same
    with pytest.raises(StreamClosed):
        pair.member.sender.acknowledged()
    assert pair.kept.steps() == (5,)


def test_a_keeper_stops_waiting_once_it_is_not_wanted() -> None:
    with pytest.raises(StreamClosed, match="the member did not connect"):
        meet_member(HashStore(), "1/keeper/0", LOOPBACK, lambda: False)


def test_buddies_exchange_the_parts_that_only_one_of_them_has() -> None:
    layout, store = layout_of(("a", "b")), HashStore()
    placement = ExpertPlacement.balanced(2, 2)
    plan = GenerationPlan(1, layout.world, placement, None, "1/4", StoreAddress("", 0), buddies=(1, 0))

    def protect(rank: int) -> tuple[SnapshotReplicator, SnapshotStore]:
        ((to_buddy, from_protected_rank),) = meet_buddies(store, plan, rank, LOOPBACK)
        kept = RankSnapshots(4, 1 - rank, layout, shared_only=True)
        sender = SnapshotSender(RankSnapshots(4, rank, layout, False), [to_buddy], 1)
        replicator = SnapshotReplicator(sender, [SnapshotReceiver(kept, from_protected_rank)], takes_cores=True)
        held = SnapshotStore()
        replicator.start(held)
        return replicator, held

    with ThreadPoolExecutor(2) as pool:
        members = [each.result(WAIT_S) for each in [pool.submit(protect, rank) for rank in range(2)]]
    for rank, (replicator, _) in enumerate(members):
        replicator.sender.begin(7, shard_of(layout, rank, 7.0), "note")
    for rank, (replicator, _) in enumerate(members):
        replicator.sender.acknowledged()
        assert members[1 - rank][1].find(Holding(4, 7, rank)).note == "note"
    everywhere = {"param/dense", "buffer/bias"}
    assert everywhere.isdisjoint(members[0][1].find(Holding(4, 7, 1)).ranges.names())
    for replicator, _ in members:
        replicator.close()


def test_two_copies_of_each_snapshot_are_with_two_others() -> None:
    layout, store = layout_of(("a", "b", "c")), HashStore()
    first, second = (1, 2, 0), (2, 0, 1)
    placement = ExpertPlacement.balanced(2, 3)
    plan = GenerationPlan(
        1, layout.world, placement, None, "1/4", StoreAddress("", 0), buddies=first, second_buddies=second
    )

    def protect(rank: int) -> tuple[SnapshotReplicator, SnapshotStore]:
        met = meet_buddies(store, plan, rank, LOOPBACK)
        own = RankSnapshots(4, rank, layout, False)
        kept = [RankSnapshots(4, ring.index(rank), layout, shared_only=True) for ring in (first, second)]
        sender = SnapshotSender(own, [to_buddy for to_buddy, _ in met], 1)
        assert sender.whole_bytes == own.copied_bytes(whole=True) + 2 * own.shared_bytes(whole=True)
        receivers = [SnapshotReceiver(each, stream) for each, (_, stream) in zip(kept, met, strict=True)]
        replicator, held = SnapshotReplicator(sender, receivers, takes_cores=True), SnapshotStore()
        replicator.start(held)
        return replicator, held

    with ThreadPoolExecutor(3) as pool:
        members = [each.result(WAIT_S) for each in [pool.submit(protect, rank) for rank in range(3)]]
    for rank, (replicator, _) in enumerate(members):
        replicator.sender.begin(7, shard_of(layout, rank, 7.0), f"note {rank}")
    for replicator, _ in members:
        replicator.sender.acknowledged()
    for _, held in members:
        assert held.holdings() == tuple(Holding(4, 7, rank) for rank in range(3))
    members[0][0].shut()  # a rank without one of its buddies has lost it
    members[1][0].sender.begin(8, shard_of(layout, 1, 8.0), "note")
    with pytest.raises(StreamClosed):
        members[1][0].sender.acknowledged()
    for replicator, _ in members:
        replicator.close()
