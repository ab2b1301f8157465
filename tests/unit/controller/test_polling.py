"""Limit of the controller's rounds."""

from itertools import pairwise

import pytest

from orchestrator.controller.polling import RoundLimiter


def _rounds(limiter: RoundLimiter, asked_s: list[float]) -> list[float]:
    return [now_s for now_s in asked_s if limiter.begins(now_s)]


def test_rounds_are_limited_whatever_is_asked_for() -> None:
    begun = _rounds(RoundLimiter(20.0), [1000.0 + n / 1300 for n in range(13_000)])  # 1300 answers a second, for 10 s
    assert 20 + 20 * 9 < len(begun) <= 20 + 20 * 10
    later = [now_s for now_s in begun if now_s >= 1002.0]
    assert max(after - before for before, after in pairwise(later)) < 0.055


def test_a_few_changes_after_a_pause_are_not_delayed() -> None:
    limiter = RoundLimiter(20.0)
    for burst_s in (1000.0, 1002.0, 1004.0):
        assert limiter.wait_s(burst_s) == 0.0
        assert len(_rounds(limiter, [burst_s + n / 1000 for n in range(20)])) == 20


def test_the_next_round_begins_after_the_wait_and_not_before() -> None:
    limiter = RoundLimiter(20.0)
    _rounds(limiter, [1000.0] * 50)
    wait_s = limiter.wait_s(1000.02)
    assert wait_s == pytest.approx(0.03)
    assert not limiter.begins(1000.02 + wait_s - 0.001)
    assert limiter.begins(1000.02 + wait_s + 0.001)
