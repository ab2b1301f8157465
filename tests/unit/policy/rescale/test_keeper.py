"""A world of one and its warm standbys: which of them keeps its snapshots, and what its loss costs."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.policy.lifecycle import decide
from orchestrator.policy.rescale.keeper import AGAIN_S
from orchestrator.policy.state.requests import begun_again
from orchestrator.policy.state.run_parts import KeeperState
from orchestrator.protocol.messages import Keeper
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from tests.unit.policy.imagined import Life, limits_of


def _alone(standby: int = 1, **changes: Any) -> Life:
    """One worker, and warm standbys, the first of which keeps its snapshots."""
    life = Life(limits_of(steps=60, initial_workers=1, standby=standby, **changes))
    life.run_until(lambda: life.step >= 6 and len(life.state.worker_group) == 1 + standby)
    return life


def _chosen(life: Life) -> list[tuple[int, str, int]]:
    return [(keeper.number, keeper.worker, keeper.generation) for keeper in life.state.keeping.chosen]


def _trained(life: Life) -> None:
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why
    assert len(life.done_by) == life.limits.steps and life.progress.watermark == life.limits.steps - 1


def test_the_loss_of_a_lone_worker_costs_a_step_at_most() -> None:
    life = _alone()
    assert _chosen(life) == [(0, "w1", 0)] and life.keeper is not None
    published = life.progress.watermark
    life.kill("w0")
    life.run_until(lambda: life.state.activated == 1)
    (recovery,) = life.state.recoveries
    assert life.state.members == ("w1",) and recovery.source == "memory"
    assert recovery.step >= published and recovery.steps_replayed <= 1 and recovery.steps_lost == 0
    life.run_until(lambda: life.keeper is not None)
    assert _chosen(life) == [(1, "w2", 1)]  # the replacement keeps in turn
    life.tick()
    assert [note.worker for note in life.of_kind("keeper_connected")] == ["w1", "w2"]
    assert life.of_kind("keeper_lost") == []
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1


def test_there_is_no_keeper_for_several_workers_or_without_protection_or_standby() -> None:
    for changes in ({"initial_workers": 2, "standby": 1}, {"protected": False, "standby": 1}, {"standby": 0}):
        life = Life(limits_of(steps=12, **({"initial_workers": 1} | changes)))
        life.run_to_the_end()
        assert life.state.keeping.count == 0
        _trained(life)


def test_a_lost_keeper_is_replaced_and_costs_nothing() -> None:
    life = _alone(standby=2)
    life.kill("w1")
    life.run_until(lambda: life.keeper is not None)
    assert _chosen(life) == [(1, "w2", 0)] and [note.worker for note in life.of_kind("keeper_lost")] == ["w1"]
    life.kill("w0")
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1 and not life.of_kind("rolled_back")


def test_the_loss_of_both_sends_the_run_back() -> None:
    life = _alone()
    life.kill("w1")
    life.kill("w0")
    life.run_to_the_end()
    _trained(life)
    assert life.state.recoveries[0].source == "checkpoint" and life.of_kind("rolled_back")


def test_a_keeper_that_becomes_a_member_keeps_what_it_has_until_the_new_world_has_settled() -> None:
    life = _alone()
    life.scale(2)
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.members == ("w0", "w1") and _chosen(life) == []
    life.kill("w0")
    life.run_to_the_end()
    _trained(life)
    assert not life.of_kind("rolled_back") and life.replayed <= 2


def test_a_worker_that_leaves_the_world_keeps_for_the_one_that_stays() -> None:
    life = Life(limits_of(steps=60, initial_workers=2, standby=1))
    life.run_until(lambda: life.step == 3)
    life.scale(1)
    life.run_until(lambda: life.state.activated == 1)
    assert [keeper.generation for keeper in life.state.keeping.chosen] == [1]
    life.run_until(lambda: life.keeper is not None and life.step > 8)
    life.kill(life.state.members[0])
    life.run_to_the_end()
    _trained(life)
    assert life.replayed <= 1 and not life.of_kind("rolled_back")


def test_a_surplus_worker_does_not_keep() -> None:
    life = Life(limits_of(steps=30, initial_workers=2, standby=0))
    life.run_until(lambda: life.step == 3)
    life.scale(1)
    life.run_to_the_end()
    _trained(life)
    assert life.state.keeping.count == 0


def test_a_generation_settles_once_its_keeper_has_a_snapshot() -> None:
    life = _alone()
    state = replace(life.state, settled=-1)
    (keeper,) = state.keeping.chosen
    life.say("w0", settled=0)
    assert decide(life.limits, state, life.seen()).state.settled == 0
    state = replace(state, keeping=replace(state.keeping, chosen=(replace(keeper, number=5),), count=6))
    assert decide(life.limits, state, life.seen()).state.settled == -1  # not connected yet
    life.say("w1", unkept=5)
    assert decide(life.limits, state, life.seen()).state.settled == 0  # and won't be


def test_a_keeper_that_is_to_leave_stays_until_another_one_has_a_snapshot() -> None:
    life = _alone()
    life.say("w1", leaving=True)
    life.holds_still = True  # nothing connects
    life.run_until(lambda: "w2" in life.state.worker_group and life.seen().phase("w2") is Phase.STANDBY)
    for _ in range(3):
        life.tick()
    assert "w1" in life.state.worker_group and [worker for _, worker, _ in _chosen(life)] == ["w1", "w2"]
    life.holds_still = False
    life.run_until(lambda: "w1" not in life.state.worker_group)
    assert _chosen(life) == [(1, "w2", 0)]


def test_a_connection_that_ends_is_made_again_after_a_while() -> None:
    life = _alone()
    life.say("w0", unkept=0)
    life.keeper = None
    began_s = life.now_s
    life.run_until(lambda: life.state.keeping.count == 2)
    assert life.now_s - began_s >= AGAIN_S and _chosen(life)[-1] == (1, "w1", 0)
    life.run_until(lambda: _chosen(life) == [(1, "w1", 0)])


def test_recovery_waits_for_what_the_keeper_reports_but_not_for_ever() -> None:
    life = _alone()
    life.keeper = None  # so that its report never comes
    life.kill("w0")
    life.run_until(lambda: life.state.is_recovering)
    began_s = life.now_s
    assert not life.state.wants_restore
    life.run_until(lambda: life.state.wants_restore)
    assert life.now_s - began_s >= 2


def test_a_keeper_without_a_report_is_waited_for_until_it_is_lost() -> None:
    life = _alone()
    life.keeper = None
    life.kill("w0")
    life.run_until(lambda: life.state.is_recovering)
    life.say("w1", unkept=0, holdings=life.held_by("w1"))
    life.now_s += 60  # a restarted controller has no report yet
    unheard = decide(life.limits, life.state, life.seen(reports={}, lost={})).state
    assert not unheard.wants_restore and unheard.next is None
    heard = decide(life.limits, life.state, life.seen()).state
    assert heard.next is not None and heard.next.world.members == ("w1",)
    lost = decide(life.limits, life.state, life.seen(reports={}, lost={"w1": "gone"})).state
    assert lost.wants_restore


def test_a_recovery_from_memory_seeks_no_checkpoint_any_more() -> None:
    life = _alone()
    life.keeper, life.unreadable = None, "storage does not answer"
    life.kill("w0")
    life.run_until(lambda: life.state.wants_restore)
    life.say("w1", unkept=0, holdings=life.held_by("w1"))
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.recoveries[0].source == "memory" and not life.state.wants_restore
    life.run_to_the_end()
    _trained(life)


def test_numbers_of_keepers_are_not_reused_after_the_run_restarts() -> None:
    life = _alone()
    assert begun_again(life.state, None).keeping == KeeperState(count=1)


def test_the_only_state_is_used_although_its_keeper_is_to_leave() -> None:
    life = _alone()
    life.say("w1", leaving=True)
    life.frozen = {"w2", "w3"}  # no other worker becomes warm
    life.kill("w0")
    life.run_until(lambda: life.state.activated == 1)
    assert life.state.members == ("w1",) and life.state.recoveries[0].source == "memory"


@pytest.mark.parametrize("nodes", [{"w0": "a", "w1": "a", "w2": "b"}, {"w0": "b", "w1": "b", "w2": "a"}])
def test_a_keeper_on_another_node_is_preferred(nodes: dict[str, str]) -> None:
    life = Life(limits_of(steps=60, initial_workers=1, standby=2), nodes=nodes)
    life.run_until(lambda: bool(_chosen(life)))
    assert [worker for _, worker, _ in _chosen(life)] == ["w2"]


def test_the_directive_names_keepers_and_their_stores() -> None:
    life = _alone()
    assert life.store is not None
    (keeper,) = life.directive.keepers
    assert keeper == Keeper(0, "w1", 0, life.store, "1/keeper/0", keeper.after_step)
    assert -1 <= keeper.after_step <= life.progress.watermark
