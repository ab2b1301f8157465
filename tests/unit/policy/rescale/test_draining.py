"""Nodes that are drained and workers that get SIGTERM: left at a fence, before they end."""

from dataclasses import replace

import pytest

from orchestrator.policy.health.budget import cause_of_loss
from orchestrator.policy.lifecycle import decide, explain
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.events.workers import NodeDraining
from orchestrator.protocol.messages import DesiredRunState, FinishMode
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.workers import ScheduledScale
from tests.unit.policy.imagined import Life, limits_of


def _life(drain: str = "b", **changes: object) -> Life:
    """Workers live on nodes a, b and c in turn; one node is drained once step 3 is done."""
    limits = limits_of(**{"steps": 120, "initial_workers": 3, **changes})
    life = Life(limits, nodes={f"w{number}": "abc"[number % 3] for number in range(12)})
    life.run_until(lambda: life.step == 3)
    life.draining = {drain: life.now_s + 30.0}
    return life


def test_a_standby_on_another_node_replaces_a_leaving_member() -> None:
    life = _life(standby=1)
    life.run_until(lambda: "w1" not in life.state.worker_group)
    assert life.state.members == ("w0", "w3", "w2")
    (rescale,) = life.state.rescales
    assert (rescale.from_size, rescale.to_size, rescale.why) == (3, 3, "w1 must leave: its node is drained")
    assert life.now_s < life.draining["b"]
    (note,) = life.of_kind("node_draining")
    assert note == NodeDraining("b", ("w1",), 30.0)
    life.run_until(lambda: len(life.state.worker_group) == 4)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and life.replayed == 0 and not life.state.recoveries


def test_without_a_standby_the_others_continue_and_the_replacement_joins_later() -> None:
    life = _life()
    life.run_until(lambda: life.state.members == ("w0", "w2"))
    life.run_until(lambda: life.state.members == ("w0", "w2", "w3"))
    assert "w1" not in life.state.worker_group and life.replayed == 0
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_a_replacement_on_a_drained_node_is_released_too() -> None:
    life = _life(drain="a")  # w0 leaves, and w3 lives on that node too
    life.run_until(lambda: life.state.members == ("w1", "w2"))
    life.run_until(lambda: len(life.state.members) == 3)
    assert "w3" not in life.state.members and all(life.nodes[w] != "a" for w in life.state.worker_group)


def test_fewer_than_the_least_wait_for_replacements() -> None:
    life = _life(min_workers=3)
    life.run_until(lambda: len(life.state.worker_group) == 4)
    assert life.state.members == ("w0", "w1", "w2")
    said = explain(life.limits, life.state, life.seen())
    assert said == "w1 must leave: its node is drained; waits for others to take over"
    life.run_until(lambda: life.state.members == ("w0", "w3", "w2"))
    assert life.replayed == 0 and [r.to_size for r in life.state.rescales] == [3]


def test_all_may_have_to_leave() -> None:
    life = _life()
    life.draining = dict.fromkeys("abc", 0.0)
    life.nodes |= {f"w{number}": "d" for number in range(3, 12)}
    life.run_until(lambda: life.state.members == ("w3", "w4", "w5"))
    assert life.replayed == 0 and life.of_kind("node_draining")[0].seconds_left is None
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_a_standby_on_a_drained_node_is_released_and_never_chosen() -> None:
    life = _life(drain="a", initial_workers=2, standby=1)
    life.nodes |= {"w0": "c", "w2": "a"}
    assert life.state.members == ("w0", "w1")
    life.run_until(lambda: life.reports["w2"].phase is Phase.STANDBY)
    life.tick()
    life.scale(3)
    life.run_until(lambda: len(life.state.members) == 3)
    assert "w2" not in life.state.members and "w2" not in life.state.worker_group


def test_a_worker_with_sigterm_leaves_in_the_same_way() -> None:
    life = _life(standby=1)
    life.draining = {}
    life.say("w2", leaving=True)
    life.run_until(lambda: "w2" not in life.state.worker_group)
    assert life.state.members == ("w0", "w1", "w3")
    assert life.state.rescales[0].why == "w2 must leave: it was asked to end"


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_leaver_that_is_too_late_counts_as_preempted(is_announced: bool) -> None:
    life = _life(min_workers=3)
    life.draining = life.draining if is_announced else {}
    life.tick()
    seen: Observation = replace(life.seen(), lost={"w1": "its node is gone"}, nodes={}, draining={})
    assert cause_of_loss(life.state, seen, "w1") == ("preemption" if is_announced else "worker")
    assert cause_of_loss(life.state, replace(seen, causes={"w1": "out_of_memory"}), "w1") == "out_of_memory"
    life.kill("w1")
    life.run_until(lambda: bool(life.state.recoveries) and len(life.state.members) == 3)
    assert life.state.recoveries[0].cause == ("preemption" if is_announced else "worker")
    assert life.state.recoveries[0].steps_lost == 0


def test_a_run_whose_only_node_is_drained_continues_as_long_as_it_can() -> None:
    life = _life(steps=20)
    life.draining = dict.fromkeys("abc", 0.0)
    for number in range(3, 12):  # they get no place
        del life.nodes[f"w{number}"]
        life.frozen.add(f"w{number}")
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and life.replayed == 0 and not life.state.rescales


# -- when more happens than a drain ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ticks", [0, 1])
def test_a_node_may_end_as_soon_as_its_members_have_left(ticks: int) -> None:
    """Three workers that go with it are no three workers that never get warm."""
    nodes = {f"w{number}": "ab"[number >= 3] for number in range(6)}
    life = Life(limits_of(steps=60, max_workers=6, initial_workers=6), nodes=nodes)
    life.run_until(lambda: life.step == 3)
    life.draining = {"b": life.now_s + 30.0}
    life.run_until(lambda: life.state.members == ("w0", "w1", "w2"))
    for _ in range(ticks):
        life.tick()
    for worker in ("w3", "w4", "w5"):
        if worker in life.state.worker_group:
            life.kill(worker)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why


def test_a_node_that_ends_while_its_workers_get_warm_is_one_failure() -> None:
    nodes = {"w0": "a", "w1": "a", "w2": "b", "w3": "b", "w4": "b"}
    life = Life(limits_of(steps=60, max_workers=6), nodes=nodes)
    life.run_until(lambda: life.step == 8)
    life.scale(5)
    life.run_until(lambda: len(life.state.worker_group) == 5)
    life.tick()
    for worker in ("w2", "w3", "w4"):
        life.kill(worker)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED, life.state.why


def test_leavers_go_first_when_a_run_shrinks() -> None:
    life = Life(limits_of(steps=200, min_workers=2, initial_workers=3), nodes={"w0": "b", "w1": "b", "w2": "c"})
    life.run_until(lambda: life.step == 3)
    life.draining = {"b": life.now_s + 30.0}
    life.frozen |= {f"w{number}" for number in range(3, 12)}
    life.tick()
    life.scale(2)
    life.run_until(lambda: len(life.state.members) == 2)
    assert "w2" in life.state.members


def test_at_the_minimum_size_only_as_many_leave_as_there_are_standbys() -> None:
    nodes = {"w0": "a", "w1": "b", "w2": "b", "w3": "d"}
    life = Life(limits_of(steps=200, min_workers=3, initial_workers=3), nodes=nodes)
    life.run_until(lambda: life.step == 3)
    life.draining = {"b": life.now_s + 30.0}
    life.frozen |= {f"w{number}" for number in range(4, 12)}  # there is only one place elsewhere
    life.run_until(lambda: life.now_s >= life.draining["b"])
    assert life.state.members == ("w0", "w3", "w2")
    life.kill("w2")
    life.frozen.clear()
    life.nodes |= {f"w{number}": "d" for number in range(4, 20)}
    life.run_to_the_end()
    assert life.replayed == 0 and life.state.outcome is RunPhase.SUCCEEDED


def test_a_restarted_controller_knows_the_leavers_and_releases_none_before_all_have_reported() -> None:
    nodes = {"w0": "a", "w1": "b", "w2": "c", "w3": "d"}
    life = Life(limits_of(steps=200, min_workers=3, initial_workers=3), nodes=nodes)
    life.run_until(lambda: life.step == 3)
    life.draining = {"b": life.now_s + 30.0}
    life.run_until(lambda: "w3" in life.state.worker_group)
    first = life.seen(reports={}, nodes={}, lost={}, draining={})
    decision = decide(life.limits, life.state, first)
    assert decision.state.worker_group == life.state.worker_group and decision.state.leaving == ("w1",)


def test_a_departure_does_not_wait_for_a_scheduled_change() -> None:
    limits = limits_of(steps=60, standby=1, schedule=(ScheduledScale(at_step=20, workers=3),))
    life = Life(limits, nodes={"w0": "a", "w1": "b", "w2": "c", "w3": "d"})
    life.run_until(lambda: life.state.next is not None and life.step > 5)
    life.draining = {"b": life.now_s + 6}
    life.run_until(lambda: life.now_s >= life.draining["b"])
    assert "w1" not in life.state.members
    life.run_until(lambda: len(life.state.members) == 3)
    assert life.step >= 20


def test_a_departure_goes_without_a_newcomer_that_can_not_be_reached() -> None:
    nodes = {"w0": "a", "w1": "b", "w2": "c", "w3": "new"}
    life = Life(limits_of(steps=300, initial_workers=3, standby=1), nodes=nodes)
    life.run_until(lambda: life.step == 3)
    life.draining = {"b": life.now_s + 300.0}
    while life.now_s < life.draining["b"] and "w1" in life.state.worker_group:
        life.tick()
        if (plan := life.state.next) is not None and "w3" in plan.world:
            for worker in plan.involved:
                life.say(worker, failed_generation=plan.generation)
    assert life.state.members == ("w0", "w2") and life.state.outcome is None
    assert life.now_s < life.draining["b"] - 200.0


def test_a_recovery_takes_the_members_that_stay() -> None:
    nodes = {"w0": "b", "w1": "c", "w2": "d", "w3": "e"}
    life = Life(limits_of(steps=100, min_workers=2, standby=2), nodes=nodes)
    life.run_until(lambda: life.step == 8)
    life.draining = {"b": life.now_s + 20}
    life.kill("w1")
    life.run_until(lambda: bool(life.state.recoveries))
    assert life.state.members == ("w2", "w3") and life.state.recoveries[0].steps_lost == 0


def test_a_stranded_leaver_is_released_after_a_rollback() -> None:
    life = Life(limits_of(steps=60, min_workers=2, max_workers=2, protected=False), nodes={"w0": "a"})
    life.run_until(lambda: life.step == 5)
    life.draining = {"a": 0.0}
    life.tick()
    life.kill("w1")
    life.run_until(lambda: life.step == 30)
    assert "w0" not in life.state.worker_group


@pytest.mark.parametrize("least", [1, 2])
def test_a_run_that_is_to_pause_while_its_nodes_go_away_ends(least: int) -> None:
    """All are lost in their last step, or so many that too few are left."""
    life = Life(limits_of(steps=100, min_workers=least), nodes={"w0": "a", "w1": "b"})
    life.run_until(lambda: life.step == 5)
    life.draining = {"a": life.now_s + 3, "b": life.now_s + 3}
    life.holds_still = True
    life.target = DesiredRunState(seq=life.target.seq + 1, workers=2, finish=FinishMode.PAUSE)
    life.tick()
    life.kill("w1")
    if least == 1:
        life.kill("w0")
    life.holds_still = False
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.PAUSED
