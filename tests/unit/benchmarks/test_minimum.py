"""The brute force against numbers worked out by hand, and the planner against the brute force."""

import pytest

from benchmarks.support.minimum import holdings, minimum_bytes
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from tests.support.layouts import layout_of_state

DENSE, FIRST, SECOND = ParamSpec("dense", (20,), None), ParamSpec("a", (3,), 0), ParamSpec("b", (5,), 1)
PARAMS = [DENSE, FIRST, SECOND]
ONE, TWO = World(0, ("w0",)), World(1, ("w0", "w1"))


def test_the_holder_of_each_state() -> None:
    held = holdings(PARAMS, TWO, ExpertPlacement.balanced(2, 2))
    weights, moments = held["w1"]
    assert weights.tolist() == [True] * 20 + [False] * 3 + [True] * 5
    # 20 dense elements on 2 ranks: 32 with padding, 16 and 4.
    assert moments.tolist() == [False] * 16 + [True] * 4 + [False] * 3 + [True] * 5
    assert held["w0"][1].tolist() == [True] * 16 + [False] * 4 + [True] * 3 + [False] * 5


def test_a_newcomer_gets_its_weights_and_its_part_of_the_moments() -> None:
    bytes_moved = minimum_bytes(PARAMS, 7, ONE, ExpertPlacement.balanced(2, 1), TWO, ExpertPlacement.balanced(2, 2))
    assert bytes_moved == 4 * ((20 + 5) + 2 * (4 + 5) + 7)


def test_survivors_get_what_only_the_leaver_had() -> None:
    bytes_moved = minimum_bytes(PARAMS, 7, TWO, ExpertPlacement.balanced(2, 2), ONE, ExpertPlacement.balanced(2, 1))
    assert bytes_moved == 4 * (5 + 2 * (4 + 5))


def test_nothing_moves_where_nothing_changes() -> None:
    same = World(2, TWO.members)
    assert minimum_bytes(PARAMS, 7, TWO, ExpertPlacement.balanced(2, 2), same, ExpertPlacement.balanced(2, 2)) == 0


@pytest.mark.parametrize("sizes", [(2, 4), (4, 3), (3, 1), (1, 2), (5, 7)], ids=str)
def test_the_planner_moves_no_more(sizes: tuple[int, int]) -> None:
    params = [ParamSpec("head", (101,), None)]
    for expert in range(5):
        params += [ParamSpec(f"0.{expert}", (17,), expert), ParamSpec(f"1.{expert}", (6,), expert)]
    old, new = (World(n, tuple(f"w{i}" for i in range(size))) for n, size in enumerate(sizes))
    placed = ExpertPlacement.balanced(5, old.size)
    placed_anew = ExpertPlacement.rebalanced(placed, old, new)
    before = layout_of_state(params, placed, old, False, [("bias", (9,))])
    after = layout_of_state(params, placed_anew, new, False, [("bias", (9,))])
    wanted = minimum_bytes(params, 9, old, placed, new, placed_anew)
    assert TransferPlan.between(before, after).moved_bytes == wanted
