"""The square of a gradient's norm, against fp64 from the beginning."""

import pytest
import torch

from orchestrator.engine.deepspeed.zero_optimizer import NORM_BLOCK, square_of


@pytest.mark.parametrize("length", [0, 1, NORM_BLOCK - 1, NORM_BLOCK, 3 * NORM_BLOCK + 16, 1 << 20])
def test_the_square_is_that_of_fp64(length: int) -> None:
    x_N = torch.randn(length, generator=torch.Generator().manual_seed(length)) * 1e-4
    square = square_of([x_N, x_N[:0]])
    assert square.dtype == torch.float64
    assert float(square) == pytest.approx(float(x_N.double().square().sum()), rel=1e-6)


def test_what_fp32_cannot_hold_is_added_up_in_fp64() -> None:
    x_N = torch.full((2 * NORM_BLOCK,), 1e25)
    assert float(square_of([x_N])) == pytest.approx(2 * NORM_BLOCK * 1e50, rel=1e-6)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(wrong: float) -> None:
    x_N = torch.ones(NORM_BLOCK + 3)
    x_N[5] = wrong
    assert not torch.isfinite(square_of([x_N]))
