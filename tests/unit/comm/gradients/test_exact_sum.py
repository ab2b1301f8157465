"""Sums whose bits depend on nothing but their terms."""

from itertools import pairwise
from math import fsum, inf, isnan, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.comm.gradients.exact_sum import (
    CHUNK,
    GRID,
    LARGEST_SUM,
    add_rounded,
    largest_of,
    largest_term,
    put_rounded,
    square_sums,
    total_square,
)
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**31)


def _terms(seed: int, count: int, numel: int, largest: float) -> list[torch.Tensor]:
    """Of very different sizes, up to what is allowed."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 1, (count, numel), generator=generator)
    return list(
        ((torch.rand(count, numel, generator=generator) * 2 - 1) * 2.0**exponents * largest).to(devices.device())
    )


def _values(*values: float) -> torch.Tensor:
    return torch.tensor(values, device=devices.device())


def _sum(terms: list[torch.Tensor]) -> torch.Tensor:
    total = torch.empty(len(terms[0]), dtype=torch.float64, device=terms[0].device)
    put_rounded(total, terms[0])
    for term in terms[1:]:
        add_rounded(total, term)
    return total


def _square(*pieces: torch.Tensor) -> float:
    """Of all pieces, each of which is another rank's."""
    largest = torch.stack([largest_of([piece]) for piece in pieces]).max()
    return float(total_square(sum(square_sums([piece], largest) for piece in pieces), largest))  # type: ignore[arg-type]


@given(seed=SEEDS, count=SIZES, order=st.randoms(use_true_random=False), cut=st.integers(0, 40))
def test_neither_the_order_nor_the_rank_of_additions_changes_a_bit(
    seed: int, count: int, order: object, cut: int
) -> None:
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


def test_the_grid_has_the_documented_range() -> None:
    for term, kept in (
        (LARGEST_SUM, LARGEST_SUM),
        (LARGEST_SUM - GRID, LARGEST_SUM - GRID),
        (GRID * 0.75, GRID),
        (GRID * 0.25, 0.0),
    ):
        total = _sum([torch.tensor([term], dtype=torch.float64, device=devices.device())])
        assert float(total) == kept
        add_rounded(total, torch.tensor([-term], dtype=torch.float64, device=devices.device()))
        assert float(total) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_terms_of_any_format_are_added(dtype: torch.dtype) -> None:
    terms = [torch.linspace(-2.0, 2.0, 2 * CHUNK + 5).to(devices.device(), dtype) for _ in range(3)]
    assert torch.equal(_sum(terms), 3 * terms[0].double())


@pytest.mark.parametrize("value", [inf, -inf, nan])
def test_what_is_not_finite_shows(value: float) -> None:
    terms = list(torch.ones(2, CHUNK + 3, device=devices.device()))
    terms[1][CHUNK + 1] = value
    total = _sum(terms)
    assert not torch.isfinite(total[CHUNK + 1]) and torch.isfinite(total).sum() == CHUNK + 2
    assert isnan(_square(total.float()))


@given(
    seed=SEEDS, numel=st.integers(1, 600), cuts=st.lists(st.integers(0, 600), max_size=5), exponent=st.integers(-80, 60)
)
def test_a_norm_has_the_same_bits_however_gradients_are_cut(
    seed: int, numel: int, cuts: list[int], exponent: int
) -> None:
    (gradient,) = _terms(seed, 1, numel, 2.0**exponent)
    edges = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    pieces = [gradient[start:stop] for start, stop in pairwise(edges)]
    whole = _square(gradient)
    assert _square(*reversed(pieces)) == whole
    assert whole == pytest.approx(fsum(float(x) ** 2 for x in gradient), rel=numel * 2.0**-22)


@pytest.mark.parametrize("cuts", [(1,), (127, 131), (131_071,), (131_073, 262_145), (5, 200_000, 299_999)])
def test_large_gradients_too(cuts: tuple[int, ...]) -> None:
    gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(7)).to(devices.device()) * 1e-3
    pieces = torch.tensor_split(gradient, cuts)
    assert _square(*pieces) == _square(gradient) == _square(*reversed(pieces))


def test_a_norm_is_as_precise_as_fp32() -> None:
    generator = torch.Generator().manual_seed(3)
    for numel in (1, 127, 128, 1 << 17, (1 << 18) + 77):
        gradient = torch.randn(numel, generator=generator).to(devices.device()) * 1e-4
        assert _square(gradient) == pytest.approx(float(gradient.double().square().sum()), rel=1e-8)


def test_a_norm_of_nothing_and_of_the_smallest_and_the_largest() -> None:
    nothing = torch.zeros(0, device=devices.device())
    assert float(total_square(square_sums([], largest_of([])), largest_of([]))) == 0.0
    assert _square(nothing, _values(*[0.0] * 5)) == 0.0
    assert _square(_values(2.0**-100), nothing) == 2.0**-200
    assert _square(_values(2.0**127, -(2.0**127))) == 2.0**255
    assert isnan(_square(_values(1.0, 1.0, 1.0), _values(1.0, nan)))
    assert isnan(_square(_values(-inf), _values(1.0, 1.0, 1.0)))
