"""How often snapshots are taken where the job leaves it open."""

import pytest

from orchestrator.policy.protection import ALLOWED_COST, MAX_INTERVAL, MEASURED, IntervalChoice, interval_for


@pytest.mark.parametrize(
    ("cost_s", "step_s", "interval"),
    [(0.0, 1.0, 1), (0.02, 1.0, 1), (0.021, 1.0, 2), (0.1, 1.0, 5), (0.1, 0.0, 1), (10.0, 1.0, MAX_INTERVAL)],
)
def test_as_often_as_is_cheap(cost_s: float, step_s: float, interval: int) -> None:
    assert interval_for(cost_s, step_s) == interval
    if 1 < interval < MAX_INTERVAL:
        assert cost_s / interval <= ALLOWED_COST * step_s < cost_s / (interval - 1)


def test_every_step_until_some_were_measured_then_by_their_median() -> None:
    choice = IntervalChoice()
    for cost_s in (0.1, 9.0, 0.1, 0.1):
        choice.observe(cost_s, 1.0)
        assert choice.interval == 1
    choice.observe(0.1, 1.0)
    assert choice.interval == 5  # one slow one changes nothing
    for _ in range(MEASURED):
        choice.observe(0.001, 1.0)
    assert choice.interval == 1
