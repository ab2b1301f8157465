"""Sums whose bits depend on nothing but their terms."""

from itertools import pairwise
from math import fsum, inf, isnan, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.comm.exact import (
    CHUNK,
    GRID,
    LARGEST_SUM,
    add_rounded,
    largest_term,
    rounded,
    square_sums,
    total_square,
)

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def _terms(seed: int, count: int, numel: int, largest: float) -> list[torch.Tensor]:
    """Of very different sizes, up to what is allowed."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 1, (count, numel), generator=generator)
    return list((torch.rand(count, numel, generator=generator) * 2 - 1) * 2.0**exponents * largest)


def _sum(terms: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(len(terms[0]), dtype=torch.float64)
    for term in terms:
        add_rounded(total, term)
    return total


@given(seed=SEEDS, count=SIZES, order=st.randoms(use_true_random=False), cut=st.integers(0, 40))
def test_neither_order_nor_who_adds_changes_a_bit(seed: int, count: int, order: object, cut: int) -> None:
    terms = _terms(seed, count, 50, largest_term(count))
    whole = _sum(terms)
    order.shuffle(terms)  # type: ignore[attr-defined]
    parts = [part for part in (terms[:cut], terms[cut:]) if part]
    assert torch.equal(sum(_sum(part) for part in parts), whole)  # type: ignore[arg-type]


@given(seed=SEEDS, count=SIZES)
def test_each_term_is_off_by_half_a_grid_at_most(seed: int, count: int) -> None:
    terms = _terms(seed, count, 8, largest_term(count))
    for element, total in enumerate(_sum(terms).tolist()):
        exact = fsum(float(term[element]) for term in terms)
        assert abs(total - exact) <= count * GRID / 2


def test_the_grid_reaches_as_far_as_it_says() -> None:
    largest = torch.tensor([LARGEST_SUM], dtype=torch.float64)
    assert float(rounded(largest)) == LARGEST_SUM and float(rounded(largest - GRID)) == LARGEST_SUM - GRID
    assert float(rounded(torch.tensor([GRID * 0.75]))) == GRID and float(rounded(torch.tensor([GRID * 0.25]))) == 0.0


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_what_is_not_finite_shows(value: float) -> None:
    terms = [torch.ones(CHUNK + 3), torch.ones(CHUNK + 3)]
    terms[1][CHUNK + 1] = value
    total = _sum(terms)
    assert not torch.isfinite(total[CHUNK + 1]) and torch.isfinite(total).sum() == CHUNK + 2
    assert isnan(float(total_square(square_sums([total.float()]))))


@given(seed=SEEDS, numel=st.integers(1, 300), cuts=st.lists(st.integers(0, 300), max_size=5))
def test_a_norm_has_the_same_bits_however_gradients_are_cut(seed: int, numel: int, cuts: list[int]) -> None:
    (gradient,) = _terms(seed, 1, numel, 1.0)
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    pieces = [gradient[start:stop] for start, stop in pairwise(edges)]
    by_rank = [square_sums([piece]) for piece in reversed(pieces)]
    whole = total_square(square_sums([gradient]))
    assert float(total_square(torch.stack(by_rank).sum(0))) == float(whole)
    assert float(whole) == pytest.approx(fsum(float(x) ** 2 for x in gradient), rel=1e-12)


def test_squares_too_large_for_an_exact_sum_are_told() -> None:
    assert isnan(float(total_square(square_sums([torch.tensor([2.0**14])]))))
    assert float(total_square(square_sums([torch.tensor([2.0**13])]))) == 2.0**26
    assert float(total_square(square_sums([]))) == 0.0
