"""How many failure domains hold the newest committed step."""

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.policy.recovery.holders import num_holders
from tests.unit.policy.imagined import Life, limits_of


def _life(workers: int, until: Callable[[Life], bool] = lambda life: life.step >= 4, **changes: Any) -> Life:
    nodes = changes.pop("nodes", {})
    life = Life(limits_of(steps=60, initial_workers=workers, **changes), nodes=nodes)
    assert num_holders(life.state, life.seen()) == 0
    life.run_until(lambda: until(life))
    return life


@pytest.mark.parametrize(
    ("workers", "changes", "holders"),
    [
        (2, {}, 2),
        (2, {"protected": False}, 1),
        (1, {}, 1),
        (2, {"nodes": {"w0": "a", "w1": "a"}}, 2),
        (2, {"nodes": {"w0": "a", "w1": "b"}}, 2),
        (2, {"nodes": {"w0": "a", "w1": "a", "w2": "b"}, "standby": 1}, 1),
        (3, {"copies": 2}, 3),
        (3, {"copies": 2, "nodes": {"w0": "a", "w1": "a", "w2": "b"}}, 2),
        (3, {"copies": 2, "nodes": {"w0": "a", "w1": "b", "w2": "c"}}, 3),
    ],
    ids=[
        "buddies",
        "no protection",
        "alone",
        "one node",
        "two nodes",
        "buddies on one node of two",
        "two copies",
        "two copies on two nodes",
        "two copies on three nodes",
    ],
)
def test_members_hold_each_others_state(workers: int, changes: dict[str, Any], holders: int) -> None:
    life = _life(workers, **changes)
    assert num_holders(life.state, life.seen()) == holders


@pytest.mark.parametrize(
    ("nodes", "holders"), [({}, 2), ({"w0": "a", "w1": "b"}, 2), ({"w0": "a", "w1": "a"}, 2)], ids=str
)
def test_a_keeper_holds_the_state_of_a_lone_member(nodes: dict[str, str], holders: int) -> None:
    life = _life(1, lambda life: life.state.keeping.connected is not None, standby=1, nodes=nodes)
    assert num_holders(life.state, life.seen()) == holders
    life.kill("w1")
    life.run_until(lambda: "w1" not in life.state.worker_group)
    assert num_holders(life.state, life.seen()) == 1
    life.run_to_the_end()
    assert num_holders(life.state, life.seen()) == 0
