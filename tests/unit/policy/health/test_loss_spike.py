"""Which steps must be undone."""

import pytest

from orchestrator.policy.health.loss_spike import FEWEST_STEPS, MAX_NOT_FINITE, USUAL_STEPS, explosion
from tests.unit.policy.imagined import record

BEFORE = [record(step, loss=3.0 + 0.1 * (step % 5)) for step in range(40)]


@pytest.mark.parametrize(
    ("loss", "factor", "explodes"),
    [(6.3, 2.0, False), (6.5, 2.0, True), (6.5, 3.0, False), (1e9, None, False), (float("nan"), 2.0, True)],
)
def test_a_loss_far_above_the_median_explodes(loss: float, factor: float | None, explodes: bool) -> None:
    why = explosion(BEFORE, record(40, loss=loss), factor)
    assert bool(why) is explodes
    if explodes:
        assert "the loss of step 40 is" in why


def test_a_small_loss_may_multiply() -> None:
    before = [record(step, loss=0.01) for step in range(40)]
    assert not explosion(before, record(40, loss=0.9), 2.0)
    assert explosion(before, record(40, loss=1.1), 2.0)


def test_few_steps_judge_nothing_and_old_ones_neither() -> None:
    assert not explosion(BEFORE[: FEWEST_STEPS - 1], record(7, loss=99.0), 2.0)
    high = [record(step, loss=50.0) for step in range(60)]
    low = [record(60 + step, loss=3.0) for step in range(USUAL_STEPS)]
    assert explosion([*high, *low], record(92, loss=7.0), 2.0)


def test_skipped_updates_count_as_an_explosion_only_if_repeated() -> None:
    bad = [record(40 + n, loss=float("nan"), applied=False) for n in range(MAX_NOT_FINITE)]
    for count, step in enumerate(bad):
        why = explosion([*BEFORE, *bad[:count]], step, None)
        assert bool(why) is (count == MAX_NOT_FINITE - 1)
    assert f"the updates of {MAX_NOT_FINITE} steps in a row were not finite" in why


def test_a_batch_that_was_left_out_is_not_judged() -> None:
    assert not explosion(BEFORE, record(40, loss=99.0, applied=False, skipped=True), 2.0)
