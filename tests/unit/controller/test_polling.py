"""Limit of the controller's rounds."""

import pytest

from orchestrator.controller.polling import RoundLimiter


@pytest.mark.parametrize("round_s", [0.001, 0.006])
def test_rounds_take_their_share_of_the_time_whatever_is_asked_for(round_s: float) -> None:
    limiter, now_s, num_rounds = RoundLimiter(1 / 9, burst_s=0.05), 1000.0, 0
    while now_s < 1010.0:
        now_s += 1 / 1300  # answers a second
        if limiter.may_begin(now_s):
            now_s += round_s
            num_rounds += 1
            limiter.ended(now_s, round_s)
    assert 0.8 * 10.0 / 9 < num_rounds * round_s <= 10.0 / 9 + 0.05 + round_s


def test_the_next_round_begins_after_the_wait_and_not_before() -> None:
    limiter = RoundLimiter(1 / 9, burst_s=0.01)
    assert limiter.wait_s(1000.0) == 0.0
    limiter.ended(1000.0, took_s=0.02)
    wait_s = limiter.wait_s(1000.02)
    assert wait_s == pytest.approx(0.07)
    assert not limiter.may_begin(1000.02 + wait_s - 0.001)
    assert limiter.may_begin(1000.02 + wait_s + 0.001)


def test_rounds_after_a_pause_wait_for_nothing_until_the_burst_is_over() -> None:
    limiter = RoundLimiter(1 / 9, burst_s=0.1)
    limiter.ended(1000.0, took_s=0.5)
    now_s, num_rounds = 1010.0, 0  # a pause gives no more than the burst
    while limiter.may_begin(now_s):
        now_s += 0.004
        limiter.ended(now_s, took_s=0.004)
        num_rounds += 1
    assert num_rounds == pytest.approx(0.1 / (0.004 * 8 / 9), abs=1)
