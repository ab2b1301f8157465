"""Sums with the same bits for any order and grouping of their terms.

Terms are rounded to multiples of one power of two and added in fp64: as long as no partial sum needs more than 53 bits
above that, no addition rounds, so addition is associative. This is fixed-point arithmetic in the mantissa of fp64, at
full processor speed, and it preserves infinity and NaN. (The idea of pre-rounding, as in Demmel and Nguyen, "Fast
Reproducible Floating-Point Summation", ARITH 2013, with a grid that is known beforehand.)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRID = 2.0**-44  # terms are multiples of it; fp32's spacing is coarser above 1e-6
LARGEST_SUM = 2.0**7  # of absolute values; a quarter of what 53 bits hold
_ROUNDING = 1.5 * 2.0**52 * GRID  # adding and subtracting it rounds values of at most 2**51 * GRID to the grid
CHUNK = 1 << 15  # elements at once, so that intermediate results stay in a core's cache

_SQUARE_BITS = 23  # bits kept of the largest element for the norm: as many as fp32 has
_BLOCK = 128  # squares of that many bits, which add up exactly in fp64
_SQUARES_AT_ONCE = 1 << 24  # elements, to limit the memory of intermediate results
_SQUARES_AT_ONCE_ON_CPU = 1 << 17  # so that a cache holds most of them
_WORD = 26  # bits of the lower word of a sum of squares


def largest_term(num_terms: int) -> float:
    """Largest absolute value of a term for which a sum of `num_terms` terms is exact."""
    return LARGEST_SUM / max(num_terms, 1)


def put_rounded(total_N: Tensor, term_N: Tensor) -> None:
    """Start a sum with its first term, rounded to the grid.

    Args:
        total_N: fp64.
        term_N: of any floating-point format; non-finite values stay non-finite.
    """
    if total_N.is_cpu:
        for total_C, term_C in _chunks(total_N, term_N):
            _round(total_C, term_C)
    else:
        total_N.copy_(term_N).add_(_ROUNDING).sub_(_ROUNDING)


def add_rounded(total_N: Tensor, term_N: Tensor) -> None:
    """Add a term, rounded to the grid, to a sum of rounded terms.

    Args:
        total_N: fp64, multiples of the grid.
        term_N: of any floating-point format; non-finite values stay non-finite.
    """
    if total_N.is_cpu:
        spare_C = np.empty(min(CHUNK, len(total_N)))
        for total_C, term_C in _chunks(total_N, term_N):
            rounded_C = spare_C[: len(term_C)]
            _round(rounded_C, term_C)
            with np.errstate(invalid="ignore"):  # opposite infinities give NaN: the step isn't finite
                np.add(total_C, rounded_C, out=total_C)
    else:
        total_N.add_(term_N.to(torch.float64, copy=True).add_(_ROUNDING).sub_(_ROUNDING))


def _chunks(total_N: Tensor, term_N: Tensor) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Chunks that fit a core's cache. NumPy's operations have less overhead per call than torch's."""
    total, term = total_N.numpy(), (term_N.float() if term_N.dtype is torch.bfloat16 else term_N).detach().numpy()
    for start in range(0, len(total), CHUNK):
        yield total[start : start + CHUNK], term[start : start + CHUNK]


def _round(out_C: NDArray[Any], term_C: NDArray[Any]) -> None:
    np.copyto(out_C, term_C)
    np.add(out_C, _ROUNDING, out=out_C)
    np.subtract(out_C, _ROUNDING, out=out_C)


def largest_of(pieces: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of all pieces, fp32: 0 if they are empty, infinity if a value is not finite."""
    ends = [torch.stack(piece.aminmax()) for piece in pieces if piece.numel()]
    if not ends:
        return torch.zeros((), device=pieces[0].device if pieces else None)
    return torch.cat(ends).abs().max().nan_to_num(nan=float("inf"), posinf=float("inf"))


def square_sums(pieces: Sequence[Tensor], largest: Tensor) -> Tensor:
    """Sums of squares, as two words of an integer (2,) int64: those of several calls may be added in any order, over
    ranks too, and `total_square` converts them to one number.

    Args:
        pieces: fp32.
        largest: largest absolute value over all calls whose sums are added up. Elements are rounded to multiples of a
            power of two that leaves it 23 bits, so that their squares are integers.
    """
    scale = torch.ldexp(torch.ones_like(largest), _exponent(largest))
    sums = [torch.zeros(1, dtype=torch.float64, device=largest.device)]
    at_once = _SQUARES_AT_ONCE_ON_CPU if largest.is_cpu else _SQUARES_AT_ONCE
    for part_C in (part_C for piece in pieces for part_C in torch.split(piece.view(-1), at_once)):
        squares_C = (part_C * scale).round_().double().square_()
        whole = len(squares_C) // _BLOCK * _BLOCK
        sums += [squares_C[:whole].view(-1, _BLOCK).sum(1), squares_C[whole:].sum()[None]]
    sums_B = torch.cat(sums).long()
    return torch.stack([(sums_B >> _WORD).sum(), (sums_B & ((1 << _WORD) - 1)).sum()])


def total_square(words: Tensor, largest: Tensor) -> Tensor:
    """The sum of squares from the words of `square_sums`, fp64. NaN where an element was not finite."""
    total = torch.ldexp(words[0].double() * 2.0**_WORD + words[1].double(), -2 * _exponent(largest))
    return torch.where(torch.isfinite(largest), total, torch.full_like(total, float("nan")))


def _exponent(largest: Tensor) -> Tensor:
    """Exponent of the power of two that scales elements before rounding, within the range of fp32."""
    return (_SQUARE_BITS - torch.frexp(largest).exponent).clamp(-126, 126)
