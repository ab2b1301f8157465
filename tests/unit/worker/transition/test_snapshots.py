"""What a lone member reports as committed, with a keeper, without one, and when it loses it."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.protocol.messages import Keeper, StateSource, StoreAddress
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.state.snapshot import copy_into
from orchestrator.worker.shard import snapshot_replicator
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.shard.snapshot_receiver import SnapshotReceiver
from orchestrator.worker.transition.snapshots import SnapshotManager
from tests.unit.worker.keeper_pair import KeeperPair, shard_of

KEEPER = Keeper(3, "b", 4, StoreAddress("", 0), "1/keeper/3", 3)


@pytest.fixture
def pair() -> Iterator[KeeperPair]:
    pair = KeeperPair()
    yield pair
    pair.close()


def _manager(me: str = "a", every: int = 1) -> SnapshotManager:
    manager = SnapshotManager(me, ProtectionSpec(every=every), last_step=99)
    manager.begin(4, None)
    return manager


def _take(manager: SnapshotManager, pair: KeeperPair, step: int) -> None:
    shard: Any = SimpleNamespace(engine=SimpleNamespace(ranges=lambda: shard_of(pair.layout, 0, float(step))))
    manager.take(shard, TrainingProgress(step, step + 1, "{}"))


def test_without_a_keeper_a_finished_step_is_reported() -> None:
    manager = _manager()
    assert not manager.due(5) and manager.interval == 0
    reported = manager.committed(4, 5, votes_tell=False)
    assert (reported["committed"], reported["settled"], reported["unkept"]) == (5, 4, -1)
    assert "held" not in reported


def test_with_a_keeper_a_step_is_committed_once_it_is_acknowledged(pair: KeeperPair) -> None:
    manager = _manager()
    manager.change_keeper(KEEPER, pair.member)
    assert manager.due(6)
    for step in (5, 6):
        _take(manager, pair, step)
        manager.acknowledged()
        reported = manager.committed(4, step + 1, votes_tell=True)
        assert reported == {"committed": step, "held": step, "settled": 4, "kept_by": 3}
    assert pair.kept.steps() == (5, 6)
    assert manager.holdings() == (Holding(4, 5, 0), Holding(4, 6, 0))


def test_a_forward_pass_that_changes_a_buffer_does_not_change_the_snapshot(
    pair: KeeperPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the copy is made, which only an update waits for."""
    may_copy = threading.Event()

    def copy(*args: Any) -> None:
        assert may_copy.wait(60.0)
        copy_into(*args)

    monkeypatch.setattr("orchestrator.worker.shard.snapshot_sender.copy_into", copy)
    manager, ranges = _manager(), shard_of(pair.layout, 0, 5.0)
    manager.change_keeper(KEEPER, pair.member)
    shard: Any = SimpleNamespace(engine=SimpleNamespace(ranges=lambda: ranges))
    manager.take(shard, TrainingProgress(5, 6, "{}"))
    ranges.view("buffer/bias", 0, 3).fill_(9.0)
    may_copy.set()
    manager.acknowledged()
    kept = pair.kept.state(5).ranges
    assert kept.view("buffer/bias", 0, 3).tolist() == [5.0, 5.0, 5.0]


def test_training_continues_without_a_keeper_that_is_lost(pair: KeeperPair) -> None:
    manager = _manager()
    manager.change_keeper(KEEPER, pair.member)
    _take(manager, pair, 5)
    manager.acknowledged()
    pair.receiver.shut()
    _take(manager, pair, 6)
    manager.acknowledged()
    assert manager.holdings() == (Holding(4, 5, 0), Holding(4, 6, 0))  # until the step is finished
    assert manager.committed(4, 7, votes_tell=True) == {"committed": 7, "settled": 4, "unkept": 3}
    assert not manager.due(7) and manager.holdings() == ()


def test_training_continues_without_a_keeper_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_replicator, "ANSWER_S", 0.3)
    monkeypatch.setattr(SnapshotReceiver, "start", lambda receiver: None)
    pair, manager = KeeperPair(), _manager()
    manager.change_keeper(KEEPER, pair.member)
    _take(manager, pair, 5)
    manager.acknowledged()
    assert manager.committed(4, 6, votes_tell=True)["unkept"] == 3
    pair.close()


def test_a_keeper_hands_over_the_state_and_frees_it(pair: KeeperPair) -> None:
    member, keeper = _manager(), SnapshotManager("b", ProtectionSpec(every=1), last_step=99)
    keeper.keep(pair.kept)
    member.change_keeper(KEEPER, pair.member)
    _take(member, pair, 5)
    member.acknowledged()
    source = StateSource(pair.layout.world, ExpertPlacement.balanced(2, 1), ("b",), 5)
    held = keeper.gathered(source, TrainingProgress(-1, 0, ""), pair.layout.tensors)
    assert held.progress == TrainingProgress(5, 6, "{}")
    assert set(held.ranges.names()) == set(shard_of(pair.layout, 0, 0.0).names())
    keeper.drop(pair.kept)
    assert keeper.holdings() == ()
