"""Sums whose bits depend neither on the order of their terms nor on who adds up which of them.

Terms are rounded to multiples of one power of two, and added up in fp64: as long as no partial sum has more than 53
bits above that, nothing is rounded any more, so the addition is associative. It is fixed-point arithmetic in fp64's
mantissa, where a processor adds as fast as ever, and where infinity and NaN stay what they are. (The idea of
pre-rounding, as in Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013, with a grid that is
known beforehand.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GRID = 2.0**-44  # terms are multiples of it: fp32 has coarser ones above 1e-6
LARGEST_SUM = 2.0**7  # of absolute values; a quarter of what 53 bits hold
_ROUNDING = 1.5 * 2.0**52 * GRID  # added and taken away again, it rounds what is at most 2**51 * GRID to the grid
CHUNK = 1 << 15  # elements at once, so that what lies between stays in a core's cache

# Squares are split over three grids, each with what the one before has left: sums of up to 2**28 of them are exact.
_SQUARE_GRIDS = (2.0**-24, 2.0**-48, 2.0**-72)
LARGEST_SQUARE_SUM = 2.0**28


def largest_term(num_terms: int) -> float:
    """What a term's absolute value may be at most, if there are so many: their sum is exact then."""
    return LARGEST_SUM / max(num_terms, 1)


def add_rounded(total_N: Tensor, term_N: Tensor) -> None:
    """Add a term, rounded to the grid, to a sum.

    Args:
        total_N: fp64, multiples of the grid.
        term_N: of any floating-point format; what is not finite stays so.
    """
    if total_N.device.type != "cpu":
        total_N.add_(rounded(term_N))
        return
    for total_C, term_C in zip(torch.split(total_N, CHUNK), torch.split(term_N, CHUNK), strict=True):
        total_C.add_(rounded(term_C))


def rounded(term_N: Tensor) -> Tensor:
    """To the grid, as fp64."""
    return term_N.to(torch.float64, copy=True).add_(_ROUNDING).sub_(_ROUNDING)


def square_sums(pieces: Sequence[Tensor]) -> Tensor:
    """Sums of squares, as fp64 for each of three grids (3): those of several calls may be added up in any order, over
    ranks too, and `total_square` makes one number of them.

    Args:
        pieces: fp32.
    """
    sums = torch.zeros(len(_SQUARE_GRIDS), dtype=torch.float64, device=pieces[0].device if pieces else None)
    for piece in pieces:
        for part in torch.split(piece.view(-1), CHUNK if piece.device.type == "cpu" else max(piece.numel(), 1)):
            rest = part.double().square_()  # exact: twice 24 bits
            for nth, grid in enumerate(_SQUARE_GRIDS):
                rounding = 1.5 * 2.0**52 * grid
                on_grid = (rest + rounding).sub_(rounding)
                sums[nth] += on_grid.sum()
                rest.sub_(on_grid)  # exact, too
    return sums


def total_square(sums: Tensor) -> Tensor:
    """What `square_sums` have come to, fp64. NaN where squares were not finite, or too large to be added exactly."""
    total = sums[0] + (sums[1] + sums[2])
    return torch.where(total < LARGEST_SQUARE_SUM, total, torch.full_like(total, float("nan")))
