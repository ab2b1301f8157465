"""Figures of the experts' loads, for counts made by hand."""

import math

import numpy as np
import pytest

from orchestrator.policy.health.expert_load import (
    SHOWN_STEPS,
    expert_load,
    is_shown,
    largest_violation,
    load_map,
    shown_loads,
)
from orchestrator.protocol.expert_load import ExpertLoad
from tests.unit.policy.imagined import record


def _counts(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize(
    ("rows", "mean", "worst", "layer"),
    [
        pytest.param([[4, 4, 4]], 0.0, 0.0, 0, id="even"),
        pytest.param([[6, 3, 0]], 1.0, 1.0, 0, id="twice the mean"),
        pytest.param([[4, 4, 4], [12, 0, 0]], 1.0, 2.0, 1, id="one of two layers"),
        pytest.param([[0, 0, 0], [12, 0, 0]], 2.0, 2.0, 1, id="a layer without tokens is left out"),
        pytest.param([[1, 0, 0, 0]], 3.0, 3.0, 0, id="few tokens count as much as many"),
        pytest.param([[7]], 0.0, 0.0, 0, id="one expert"),
    ],
)
def test_max_violation(rows: list[list[int]], mean: float, worst: float, layer: int) -> None:
    load = expert_load(_counts(rows))
    assert (load.max_violation, load.worst_violation, load.worst_layer) == (mean, worst, layer)


def test_utilisation_dead_experts_and_entropy() -> None:
    load = expert_load(_counts([[8, 8, 0, 0], [4, 4, 4, 4]]))
    assert load.utilisation == (0.5 + 1.0) / 2
    assert load.dead == 2 / 8
    assert load.entropy == pytest.approx((math.log(2) / math.log(4) + 1.0) / 2)
    assert load.swing is None


@pytest.mark.parametrize("rows", [[], [[0, 0, 0]]])
def test_nothing_routed_is_no_load(rows: list[list[int]]) -> None:
    counts = _counts(rows) if rows else np.zeros((0, 8), dtype=np.int64)
    assert expert_load(counts, counts) == ExpertLoad()


@pytest.mark.parametrize(
    ("before", "now", "swing"),
    [
        pytest.param([[9, 1, 5, 5]], [[1, 9, 5, 5]], 0.5, id="two of four changed sides"),
        pytest.param([[9, 1, 5, 5]], [[9, 1, 5, 5]], 0.0, id="unequal, and stays so"),
        pytest.param([[55, 45]], [[45, 55]], 0.0, id="noise"),
        pytest.param([[0, 0]], [[9, 1]], 0.0, id="nothing was routed before"),
    ],
)
def test_swing(before: list[list[int]], now: list[list[int]], swing: float) -> None:
    assert expert_load(_counts(now), _counts(before)).swing == swing


def test_the_heat_map_has_about_as_many_columns_for_long_runs_as_for_short_ones() -> None:
    for steps in (1, 50, 180, 1000, 123_456):
        shown = [step for step in range(steps) if is_shown(step, steps)]
        assert shown[0] == 0 and shown[-1] == steps - 1
        assert min(steps, SHOWN_STEPS) <= len(shown) <= 2 * SHOWN_STEPS


@pytest.mark.parametrize(("experts", "top_k", "wanted"), [(8, 2, 3.0), (16, 2, 7.0), (4, 4, 0.0), (1, 1, 0.0)])
def test_largest_violation(experts: int, top_k: int, wanted: float) -> None:
    one_sided = _counts([[100] * top_k + [0] * (experts - top_k)])
    assert expert_load(one_sided).max_violation == largest_violation(experts, top_k) == wanted


@pytest.mark.filterwarnings("error")
def test_a_map_has_a_column_for_each_step_with_loads_and_is_empty_where_a_layer_had_no_tokens() -> None:
    records = [
        record(0, loads=((2, 2), (4, 0))),
        record(1),
        record(3, loads=((0, 0), (0, 0))),  # its batch was left out
        record(6, loads=((3, 1), (0, 0))),
    ]
    found = load_map(shown_loads(records))
    assert found is not None and found.steps == (0, 3, 6)
    gap = math.nan
    wanted = [[[1.0, gap, 1.5], [1.0, gap, 0.5]], [[2.0, gap, gap], [0.0, gap, gap]]]
    np.testing.assert_array_equal(found.load_LES, wanted)


@pytest.mark.parametrize(
    "loads",
    [
        pytest.param({}, id="no step yet"),
        pytest.param({0: ((0, 0),)}, id="nothing routed yet"),
        pytest.param({0: (), 5: ()}, id="no MoE layers"),
    ],
)
def test_no_loads_are_no_map(loads: dict[int, tuple[tuple[int, ...], ...]]) -> None:
    assert load_map(loads) is None


def test_a_model_without_experts_has_no_loads_to_show() -> None:
    assert shown_loads([record(0), record(1, loads=())]) == {}
