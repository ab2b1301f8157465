"""Which compression is chosen for which link."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policy.estimate.compression_choice import CANDIDATES, Measured, choose, predicted_step_s

CODING = {"bf16": 0.002, "int8": 0.01, "int4": 0.015}
MEASURED = Measured(
    step_s=1.0, backward_s=0.5, num_buckets=5, gradient_bytes=100_000_000, bytes_per_s=1e9, coding_s=CODING
)


def test_a_fast_link_needs_no_compression() -> None:
    assert choose(MEASURED) == "none"
    assert predicted_step_s(MEASURED, "none") == pytest.approx(1.02)  # the last of five buckets


def test_the_slower_the_link_the_coarser_the_scheme() -> None:
    chosen = [choose(replace(MEASURED, bytes_per_s=rate)) for rate in (1e9, 2.2e8, 8e7, 1e7)]
    assert [CANDIDATES.index(scheme) for scheme in chosen] == sorted(CANDIDATES.index(scheme) for scheme in chosen)
    assert chosen[0] == "none" and chosen[-1] == "int4"


def test_what_costs_more_than_it_saves_is_not_chosen() -> None:
    slow = dict.fromkeys(CODING, 10.0)
    assert choose(replace(MEASURED, bytes_per_s=2e8, coding_s=slow)) == "none"


@given(st.floats(1e5, 1e11), st.floats(0.0, 2.0), st.integers(1, 50), st.integers(1, 10**10))
def test_the_choice_is_nearly_the_fastest(rate: float, backward_s: float, num_buckets: int, num_bytes: int) -> None:
    measured = Measured(2.0, backward_s, num_buckets, num_bytes, rate, CODING)
    chosen = predicted_step_s(measured, choose(measured))
    assert chosen <= 1.02 * min(predicted_step_s(measured, scheme) for scheme in CANDIDATES)
