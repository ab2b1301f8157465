"""How often snapshots are taken where the job leaves it open."""

import pytest

from orchestrator.policy.health.snapshot_interval import (
    ALLOWED_COST,
    MAX_INTERVAL,
    MEASURED,
    IntervalChoice,
    interval_for,
)


@pytest.mark.parametrize(
    ("cost_s", "step_s", "interval"),
    [(0.0, 1.0, 1), (0.02, 1.0, 1), (0.021, 1.0, 2), (0.1, 1.0, 5), (0.1, 0.0, 1), (10.0, 1.0, MAX_INTERVAL)],
)
def test_snapshots_are_as_frequent_as_their_cost_allows(cost_s: float, step_s: float, interval: int) -> None:
    assert interval_for(cost_s, step_s) == interval
    if 1 < interval < MAX_INTERVAL:
        assert cost_s / interval <= ALLOWED_COST * step_s < cost_s / (interval - 1)


def test_every_step_until_some_were_measured_then_by_their_median() -> None:
    choice = IntervalChoice(whole_bytes=100, mean_bytes=100)
    for cost_s in (0.1, 9.0, 0.1, 0.1):
        choice.observe(cost_s, 100, 1.0)
        assert choice.interval == 1
    choice.observe(0.1, 100, 1.0)
    assert choice.interval == 5  # one slow one changes nothing
    for _ in range(MEASURED):
        choice.observe(0.001, 100, 1.0)
    assert choice.interval == 1


@pytest.mark.parametrize(("byte_s", "interval"), [(0.0001, 1), (0.0004, 1), (0.0006, 3), (0.002, 10)])
def test_every_step_if_small_ones_are_cheap_enough_else_large_ones_now_and_then(byte_s: float, interval: int) -> None:
    choice = IntervalChoice(whole_bytes=100, mean_bytes=50)
    for num_bytes in (100, 40, 40, 40, 100):
        choice.observe(byte_s * num_bytes, num_bytes, 1.0)
    assert choice.interval == interval
