"""Experts placed by load: on request, by themselves where it pays, and never without a reason."""

from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.policy.rescale.expert_balance import KNOWN_STEPS
from orchestrator.policy.rescale.rules import MOST_REBALANCES, _with
from orchestrator.policy.state.load_average import LoadAverage
from orchestrator.protocol.expert_load import Loads
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.status import Rescale, RunPhase
from orchestrator.spec.moe.experts import PlacementSpec
from tests.unit.policy.imagined import Life, limits_of

LAYERS = ("layers.0.mlp", "layers.1.mlp")
SKEWED: Loads = ((900, 800, 700, 600, 100, 100, 100, 100), (100,) * 4 + (500,) * 4)
EVEN: Loads = ((500,) * 8, (500, 505) * 4)
BY_LOAD = PlacementSpec(policy="load")


def _life(loads: Loads, steps: int = 150, size: int = 2, **changes: Any) -> Life:
    limits = limits_of(steps=steps, initial_workers=size, moe_layers=LAYERS, **changes)
    return Life(limits, loads=loads)


def _holders(life: Life) -> list[Any]:
    assert life.state.current is not None
    return [life.state.current.placement.holders_of(layer) for layer in LAYERS]


def test_a_request_places_each_layer_by_its_own_loads() -> None:
    life = _life(SKEWED)
    life.run_until(lambda: life.step == 30)
    before = _holders(life)
    life.rebalance()
    life.run_until(lambda: bool(life.of_kind("experts_rebalanced")))
    (event,) = life.of_kind("experts_rebalanced")
    first, second = _holders(life)
    assert first != second and first != before[0] and second != before[1]
    assert event.before > 0.5 and event.after < 0.05 and event.num_moved >= 4
    life.run_to_the_end()
    assert len(life.of_kind("experts_rebalanced")) == 1 and not life.state.recoveries
    (rescale,) = life.state.rescales
    assert (rescale.from_size, rescale.to_size, rescale.step) == (2, 2, event.step)
    assert rescale.stall_s is not None and "as asked" in rescale.why
    assert life.done_by == [life.done_by[0]] * life.limits.steps


def test_even_experts_stay_where_they_are_whoever_asks() -> None:
    life = _life(EVEN, placement=BY_LOAD)
    life.run_until(lambda: life.step == 60)
    life.rebalance()
    life.run_to_the_end()
    (kept,) = life.of_kind("experts_kept")
    assert kept.rank_violation < 0.01 and "no placement lowers that by 5 %" in kept.why
    assert life.state.num_generations == 1 and not life.state.rescales


def test_a_run_places_its_experts_itself_once_if_that_pays() -> None:
    life = _life(SKEWED, placement=BY_LOAD)
    life.run_to_the_end()
    (event,) = life.of_kind("experts_rebalanced")
    assert KNOWN_STEPS <= event.step < KNOWN_STEPS + 10
    assert life.state.num_generations == 2


def test_experts_stay_if_the_steps_that_are_left_do_not_pay_for_the_stall() -> None:
    life = _life(SKEWED, steps=KNOWN_STEPS + 8, placement=BY_LOAD)
    life.run_to_the_end()
    assert not life.of_kind("experts_rebalanced") and life.state.num_generations == 1


def test_experts_stay_without_a_policy_or_a_request() -> None:
    life = _life(SKEWED)
    life.run_to_the_end()
    assert life.state.num_generations == 1


@pytest.mark.parametrize(("after_s", "share"), [(1.0, 0.0), (0.7, 0.8)])
def test_what_a_placement_gained_decides_on_the_next(after_s: float, share: float) -> None:
    """Loads that change later: moved for again only if the first change made steps shorter."""

    def step_s(plan: GenerationPlan) -> float:
        return after_s if plan.generation else 1.0

    life = _life(SKEWED, placement=BY_LOAD)
    life.step_s = step_s
    life.run_until(lambda: bool(life.of_kind("rebalance_measured")))
    (measured,) = life.of_kind("rebalance_measured")
    assert (measured.before_s, measured.after_s) == (1.0, after_s)
    assert life.state.balance.share == pytest.approx(share, abs=0.12)
    life.loads = tuple(tuple(900 if ranks == (0,) else 100 for ranks in holders) for holders in _holders(life))
    life.run_to_the_end()
    num_moves = len(life.of_kind("experts_rebalanced"))
    assert num_moves >= 2 if share else num_moves == 1


def test_a_rescale_places_experts_by_load_at_once_if_the_policy_says_so() -> None:
    life = _life(SKEWED, placement=BY_LOAD)
    life.run_until(lambda: life.state.balance.share is not None)
    life.scale(4)
    life.run_until(lambda: life.state.current is not None and life.state.current.world.size == 4)
    assert life.state.current is not None and life.state.current.placement.layers
    steps = life.step
    life.run_until(lambda: life.step == steps + 60)
    assert len(life.of_kind("experts_rebalanced")) == 1  # it was even from the beginning


def test_a_worker_that_is_lost_while_experts_move_costs_no_step_and_the_run_goes_on() -> None:
    life = _life(SKEWED, size=3)
    life.run_until(lambda: life.step == 30)
    life.rebalance()
    life.run_until(lambda: life.state.next is not None)
    life.kill("w1")
    life.run_to_the_end()
    assert life.step == life.limits.steps - 1 and life.state.balance.requests == 1
    assert len(life.of_kind("experts_rebalanced")) + len(life.of_kind("experts_kept")) == 1  # a request has an answer
    assert [*life.of_kind("experts_rebalanced"), *life.of_kind("experts_kept")][0].request == 1


def test_requests_that_come_during_a_rescale_wait_for_its_end() -> None:
    life = _life(SKEWED)
    life.run_until(lambda: life.step == 30)
    life.scale(3)
    life.run_until(lambda: life.state.next is not None)
    life.rebalance()
    life.run_until(lambda: bool(life.of_kind("experts_rebalanced") or life.of_kind("experts_kept")))
    assert life.state.current is not None and life.state.current.world.size == 3


def test_a_model_whose_layers_have_no_names_here_gets_one_placement() -> None:
    life = Life(limits_of(steps=100), loads=SKEWED)
    life.run_until(lambda: life.step == 30)
    life.rebalance()
    life.run_until(lambda: bool(life.of_kind("experts_rebalanced")))
    assert life.state.current is not None
    placement = life.state.current.placement
    assert placement.layers == () and placement.holders != ((0,),) * 4 + ((1,),) * 4


@pytest.mark.parametrize(
    ("phase", "workers", "has_loads", "why"),
    [
        (RunPhase.QUEUED, 2, True, "it is queued, not training"),
        (RunPhase.RECOVERING, 2, True, "it is recovering, not training"),
        (RunPhase.TRAINING, 1, True, "its one worker has all experts"),
        (RunPhase.TRAINING, 2, False, "no expert has got a token yet"),
    ],
)
def test_what_cannot_be_placed_by_load_is_refused(phase: RunPhase, workers: int, has_loads: bool, why: str) -> None:
    limits = limits_of()
    with pytest.raises(UsageError, match=why) as refused:
        limits.check_rebalance(phase, workers, has_loads)
    assert "continues unchanged" in str(refused.value)
    limits.check_rebalance(RunPhase.TRAINING, 2, has_loads=True)


def test_the_average_forgets_and_leaves_out_steps_without_tokens() -> None:
    average = LoadAverage().after([*((step, ((10, 0),)) for step in range(3)), (3, ((0, 0),)), (4, ())])
    assert average.last_step == 2 and average.mean_LE.tolist() == [[10.0, 0.0]] and not average.is_known
    later = average.after((step, ((0, 10),)) for step in range(3, 203))
    assert later.mean_LE[0, 0] < 0.01 and later.mean_LE[0, 1] == pytest.approx(10.0, rel=1e-3) and later.is_known
    assert later.after([(203, ((1, 2, 3),))]).mean_LE.tolist() == [[1.0, 2.0, 3.0]]  # other experts: from the beginning


def test_few_steps_far_apart_are_not_known_well_enough() -> None:
    """As a journal has them after its controller was restarted."""
    average = LoadAverage().after((step, ((10, 0),)) for step in range(0, 100_000, 500))
    assert not average.is_known
    newest = average.after((step, ((0, 10),)) for step in range(100_000, 100_020))
    assert newest.is_known and newest.mean_LE[0, 0] < 0.01


def test_where_a_choice_follows_the_placement_no_request_places_by_load() -> None:
    with pytest.raises(UsageError, match="with communication.ranks_per_token loads follow the placement"):
        limits_of(follows_placement=("ranks_per_token",)).check_rebalance(RunPhase.TRAINING, 2, has_loads=True)


def test_a_run_that_is_rebalanced_often_keeps_the_newest_in_its_state() -> None:
    moves = tuple(Rescale(g, 2, 2, g, "", experts_moved=1) for g in range(MOST_REBALANCES))
    rescale = Rescale(MOST_REBALANCES, 2, 3, 99, "")
    kept = _with((rescale, *moves), Rescale(100, 2, 2, 100, "", experts_moved=1))
    assert kept[0] == rescale and len(kept) == MOST_REBALANCES + 1 and kept[-1].generation == 100
