"""Worlds on several nodes: the order of ranks, and where replicas of experts go."""

from collections import Counter

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from tests.unit.policy.imagined import Life, limits_of

HOMES = {f"w{number}": "abab"[number % 4] for number in range(12)}


def _life(**limits: int) -> Life:
    return Life(limits_of(steps=60, max_workers=8, num_experts=2, **limits), nodes=dict(HOMES))


def _holds_every_expert(life: Life) -> bool:
    plan = life.state.current
    assert plan is not None and plan.nodes == tuple(HOMES[worker] for worker in plan.world.members)
    held = {(plan.nodes[rank], expert) for expert, ranks in enumerate(plan.placement.holders) for rank in ranks}
    return all((node, expert) in held for node, many in Counter(plan.nodes).items() for expert in (0, 1) if many > 1)


def test_the_first_ranks_are_neighbours_on_their_nodes_and_each_node_has_every_expert() -> None:
    life = _life(initial_workers=4)
    life.run_until(lambda: life.step == 2)
    assert life.state.members == ("w0", "w2", "w1", "w3")
    assert _holds_every_expert(life)


def test_newcomers_come_after_the_survivors_and_are_neighbours_too() -> None:
    life = _life(min_workers=2, initial_workers=4)
    life.run_until(lambda: life.step == 2)
    life.scale(8)
    life.run_until(lambda: len(life.state.members) == 8)
    assert life.state.members == ("w0", "w2", "w1", "w3", "w4", "w6", "w5", "w7")
    assert _holds_every_expert(life)
    life.scale(5)
    life.run_until(lambda: len(life.state.members) == 5)
    assert life.state.members == ("w0", "w2", "w1", "w3", "w4")
    assert _holds_every_expert(life)


def test_replacements_of_a_lost_node_take_what_their_node_lacks() -> None:
    life = _life(min_workers=2, initial_workers=4)
    life.run_until(lambda: life.step == 3)
    life.lost |= {"w1": "its node is gone", "w3": "its node is gone"}
    life.nodes |= {"w4": "c", "w5": "c"}
    life.run_until(lambda: life.state.members == ("w0", "w2", "w4", "w5"))
    plan = life.state.current
    assert plan is not None and plan.nodes == ("a", "a", "c", "c")
    held = [{e for e in (0, 1) if rank in plan.placement.holders[e]} for rank in range(4)]
    assert held[0] | held[1] == held[2] | held[3] == {0, 1}


@pytest.mark.parametrize("nodes", ["", "aaaa"])
def test_on_one_node_replicas_are_as_they_were(nodes: str) -> None:
    life = Life(limits_of(initial_workers=4, num_experts=2), nodes=dict(zip(HOMES, nodes, strict=False)))
    life.run_until(lambda: life.state.current is not None)
    assert life.state.current is not None and life.state.current.placement == ExpertPlacement.balanced(2, 4)
    assert life.state.members == ("w0", "w1", "w2", "w3")
