"""Events of collapses and swinging loads, their ends, and the steps that don't count."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.policy.health.expert_collapse import (
    ENOUGH_STEPS,
    SETTLED_STEPS,
    TOKENS_PER_EXPERT,
    Troubles,
    routing_news,
    routing_warnings,
)
from orchestrator.policy.health.expert_load import expert_load
from orchestrator.protocol.changes import changed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.notices import ExpertsCollapsed, ExpertsEven, LoadsSteady, LoadsSwing
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.model import ModelSpec
from tests.unit.policy.imagined import record

MODEL = ModelSpec(n_routed_experts=8, num_experts_per_tok=2)  # MaxVio is 3 at most
EVEN = ExpertLoad(max_violation=0.1, worst_violation=0.2, worst_layer=0, swing=0.0)
COLLAPSED = ExpertLoad(max_violation=1.0, worst_violation=2.9, worst_layer=2, swing=0.0)
SWINGING = replace(EVEN, swing=0.8)
COLLAPSE = ExpertsCollapsed(40, layer=1, max_violation=2.5)
SWING = LoadsSwing(40, 0.7)
NONE = Troubles()
ENOUGH = TOKENS_PER_EXPERT * MODEL.n_routed_experts


def _steps(*loads: tuple[ExpertLoad, int], first: int = 0, **changes: object) -> list[StepRecord]:
    """So many steps of each load, one after the other."""
    each = [load for load, count in loads for _ in range(count)]
    return [record(first + number, experts=load, **changes) for number, load in enumerate(each)]


def test_a_lasting_collapse_is_reported_with_its_first_step_and_layer() -> None:
    begun = [(EVEN, 100), (COLLAPSED, ENOUGH_STEPS - 1)]
    assert routing_news(MODEL, _steps(*begun), NONE) == []
    wanted = ExpertsCollapsed(100, layer=2, max_violation=2.9)
    assert routing_news(MODEL, _steps(*begun, (COLLAPSED, 1)), NONE) == [wanted]
    assert routing_news(MODEL, _steps(*begun, (EVEN, 4), (COLLAPSED, 1), (EVEN, 1)), NONE) == [wanted]
    assert routing_news(MODEL, _steps(*begun, (EVEN, 6), (COLLAPSED, 1)), NONE) == []  # too many others among them
    assert routing_news(MODEL, _steps(*begun, (COLLAPSED, 30)), NONE) == [wanted]  # which came at once
    assert routing_news(MODEL, _steps(*begun, (COLLAPSED, 30)), Troubles(collapse=COLLAPSE)) == []


def test_a_collapse_is_over_once_loads_are_even_again() -> None:
    known = Troubles(collapse=COLLAPSE)
    steps = [(COLLAPSED, 100), (EVEN, ENOUGH_STEPS - 1)]
    assert routing_news(MODEL, _steps(*steps), known) == []
    assert routing_news(MODEL, _steps(*steps, (EVEN, 1)), known) == [ExpertsEven(100)]


def test_swinging_loads_are_reported_until_they_are_over() -> None:
    swinging = _steps((EVEN, 50), (SWINGING, ENOUGH_STEPS))
    assert routing_news(MODEL, swinging[:-1], NONE) == []
    assert routing_news(MODEL, swinging, NONE) == [LoadsSwing(50, 0.8)]
    assert routing_news(MODEL, swinging, Troubles(swing=SWING)) == []
    over = _steps((SWINGING, 50), (EVEN, ENOUGH_STEPS))
    assert routing_news(MODEL, over, Troubles(swing=SWING)) == [LoadsSteady(50)]


def test_both_may_begin_at_once() -> None:
    both = _steps((EVEN, 50), (replace(COLLAPSED, swing=0.7), ENOUGH_STEPS))
    assert [note.kind for note in routing_news(MODEL, both, NONE)] == ["experts_collapsed", "loads_swing"]


@pytest.mark.parametrize(
    "silent",
    [
        pytest.param({"experts": ExpertLoad(), "applied": False, "skipped": True}, id="its batch was left out"),
        pytest.param({"experts": ExpertLoad(), "tokens": 0}, id="all its tokens are padding"),
        pytest.param({"experts": EVEN, "tokens": ENOUGH - 1}, id="very few tokens"),
    ],
)
def test_steps_without_usable_loads_are_left_out(silent: dict[str, object]) -> None:
    steps = _steps((EVEN, 50), (COLLAPSED, 10), (EVEN, 10), (COLLAPSED, 5))
    steps[60:70] = [changed(record, **silent) for record in steps[60:70]]
    assert [note.step for note in routing_news(MODEL, steps, NONE)] == [50]
    assert routing_news(MODEL, steps[:-1], NONE) == []


def test_first_steps_of_a_generation_do_not_count_for_swings() -> None:
    steps = _steps((EVEN, 50), (SWINGING, 10), (replace(EVEN, swing=None), 10), (SWINGING, 5))
    assert [note.step for note in routing_news(MODEL, steps, NONE)] == [50]


@pytest.mark.parametrize("load", [COLLAPSED, SWINGING])
def test_routers_have_time_to_settle(load: ExpertLoad) -> None:
    young = _steps((load, SETTLED_STEPS + ENOUGH_STEPS))
    assert routing_news(MODEL, young[:-1], NONE) == []
    assert [note.step for note in routing_news(MODEL, young, NONE)] == [SETTLED_STEPS]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "counts"),
    [
        pytest.param(4, 4, [[90, 90, 90, 90]], id="every token visits every expert"),
        pytest.param(4, 4, [[90, 90, 90, 80]], id="nearly every token: the user's own model may drop some"),
        pytest.param(1, 1, [[90]], id="one expert"),
        pytest.param(8, 2, [[0] * 8], id="nothing routed"),
        pytest.param(8, 1, [[1, 0, 0, 0, 0, 0, 0, 0]], id="one token"),
        pytest.param(8, 2, [[3, 3, 0, 0, 0, 0, 0, 0]], id="fewer tokens than experts"),
    ],
)
def test_no_false_alarm(num_experts: int, top_k: int, counts: list[list[int]]) -> None:
    counts_LE = np.array(counts)
    load = expert_load(counts_LE, counts_LE)
    model = ModelSpec(n_routed_experts=num_experts, num_experts_per_tok=top_k)
    steps = _steps((load, 200), tokens=int(counts_LE.sum()) // top_k)
    assert routing_news(model, steps, NONE) == []


@pytest.mark.parametrize(
    ("event", "model", "advice"),
    [
        pytest.param(COLLAPSE, {}, "raise model.bias_update_speed, which is 0.5, up to 1", id="quantile"),
        pytest.param(COLLAPSE, {"bias_update": "sign"}, "set model.bias_update to quantile", id="sign"),
        pytest.param(COLLAPSE, {"bias_update_speed": 0}, "set model.bias_update_speed, which is 0 ", id="no bias"),
        pytest.param(
            COLLAPSE, {"scoring_func": "softmax"}, "raise model.router_aux_loss_coef, which is 0.01", id="softmax"
        ),
        pytest.param(COLLAPSE, {"embedding_scale": 1}, "raise model.embedding_scale, which is 1, to 8", id="scale"),
        pytest.param(SWING, {}, "lower model.bias_update_speed, which is 0.5", id="swing"),
        pytest.param(SWING, {"scoring_func": "softmax"}, "lower train.lr", id="swing without a bias"),
    ],
)
def test_a_warning_names_what_would_help(event: Event, model: dict[str, object], advice: str) -> None:
    spec = MODEL.model_validate({"n_routed_experts": 8, "num_experts_per_tok": 2} | model)
    (told,) = routing_warnings(spec, NONE.after(event))
    assert advice in f"{told} " and "since step 40" in told
    assert "embedding_scale" not in told or "embedding_scale" in model


def test_a_warning_of_a_collapse_shows_its_extent() -> None:
    (told,) = routing_warnings(MODEL, Troubles(collapse=COLLAPSE))
    assert told.startswith("MoE layer 1 has collapsed since step 40")
    assert "MaxVio was 2.50 of 3.00 possible, where at most 1.50 is expected" in told


def test_experts_that_are_full_by_turns_need_no_faster_bias() -> None:
    told = routing_warnings(MODEL, Troubles(COLLAPSE, SWING))
    assert [line.split()[0] for line in told] == ["MoE", "the"]
    assert "raise" not in " ".join(told) and all("lower model.bias_update_speed" in line for line in told)


def test_a_run_that_goes_back_forgets_troubles_of_later_steps() -> None:
    troubles = NONE.after(COLLAPSE).after(LoadsSwing(90, 0.7))
    assert troubles.up_to(89) == Troubles(collapse=COLLAPSE)
    assert troubles.up_to(90) == troubles
    assert troubles.up_to(39) == NONE
    assert troubles.after(ExpertsEven(95)).after(LoadsSteady(96)) == NONE
