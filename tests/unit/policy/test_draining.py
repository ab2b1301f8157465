"""Nodes that are drained and workers that are told to end: left at a fence, before their end comes."""

from dataclasses import replace

import pytest

from orchestrator.policy.failures import cause_of_loss
from orchestrator.policy.lifecycle import explain
from orchestrator.policy.run_state import Observation
from orchestrator.protocol.messages import Phase
from orchestrator.protocol.status import RunPhase
from tests.unit.policy.imagined import Life, limits_of


def _life(drain: str = "b", **changes: object) -> Life:
    """Workers live on nodes a, b and c in turn; one node is drained once step 3 is done."""
    limits = limits_of(**{"steps": 120, "initial_workers": 3, **changes})
    life = Life(limits, nodes={f"w{number}": "abc"[number % 3] for number in range(12)})
    life.run_until(lambda: life.step == 3)
    life.draining = {drain: life.now_s + 30.0}
    return life


def test_a_standby_elsewhere_takes_the_place_of_who_leaves() -> None:
    life = _life(standby=1)
    life.run_until(lambda: "w1" not in life.state.crew)
    assert life.state.members == ("w0", "w3", "w2")
    (rescale,) = life.state.rescales
    assert (rescale.from_size, rescale.to_size, rescale.why) == (3, 3, "w1 must leave: its node is drained")
    assert life.now_s < life.draining["b"]
    (note,) = life.of_kind("node_draining")
    assert note.fields == {"node": "b", "workers": ["w1"], "seconds_left": 30.0}
    life.run_until(lambda: len(life.state.crew) == 4)
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and life.replayed == 0 and not life.state.recoveries


def test_without_a_standby_the_others_go_on_and_the_replacement_joins_later() -> None:
    life = _life()
    life.run_until(lambda: life.state.members == ("w0", "w2"))
    life.run_until(lambda: life.state.members == ("w0", "w2", "w3"))
    assert "w1" not in life.state.crew and life.replayed == 0
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_a_replacement_that_comes_onto_a_drained_node_is_let_go_too() -> None:
    life = _life(drain="a")  # w0 leaves, and w3 lives on that node too
    life.run_until(lambda: life.state.members == ("w1", "w2"))
    life.run_until(lambda: len(life.state.members) == 3)
    assert "w3" not in life.state.members and all(life.nodes[w] != "a" for w in life.state.crew)


def test_fewer_than_the_least_wait_for_replacements() -> None:
    life = _life(min_workers=3)
    life.run_until(lambda: len(life.state.crew) == 4)
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
    assert life.replayed == 0 and life.of_kind("node_draining")[0].fields["seconds_left"] is None
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED


def test_a_standby_on_a_drained_node_is_let_go_and_never_chosen() -> None:
    life = _life(drain="a", initial_workers=2, standby=1)
    life.nodes |= {"w0": "c", "w2": "a"}
    assert life.state.members == ("w0", "w1")
    life.run_until(lambda: life.reports["w2"].phase is Phase.STANDBY)
    life.tick()
    life.scale(3)
    life.run_until(lambda: len(life.state.members) == 3)
    assert "w2" not in life.state.members and "w2" not in life.state.crew


def test_who_is_told_to_end_leaves_in_the_same_way() -> None:
    life = _life(standby=1)
    life.draining = {}
    life.say("w2", leaving=True)
    life.run_until(lambda: "w2" not in life.state.crew)
    assert life.state.members == ("w0", "w1", "w3")
    assert life.state.rescales[0].why == "w2 must leave: it was told to end"


@pytest.mark.parametrize("told", [True, False])
def test_who_does_not_get_away_in_time_was_preempted(told: bool) -> None:
    life = _life(min_workers=3)
    life.tick()
    seen: Observation = replace(life.seen(), lost={"w1": "its node is gone"})
    assert cause_of_loss(seen if told else replace(seen, draining={}), "w1") == ("preemption" if told else "worker")
    life.kill("w1")
    life.run_until(lambda: bool(life.state.recoveries) and len(life.state.members) == 3)
    assert life.state.recoveries[0].cause == "preemption" and life.state.recoveries[0].steps_lost == 0


def test_a_run_whose_only_node_is_drained_goes_on_as_long_as_it_can() -> None:
    life = _life(steps=20)
    life.draining = dict.fromkeys("abc", 0.0)
    for number in range(3, 12):  # they get no place
        del life.nodes[f"w{number}"]
        life.frozen.add(f"w{number}")
    life.run_to_the_end()
    assert life.state.outcome is RunPhase.SUCCEEDED and life.replayed == 0 and not life.state.rescales
