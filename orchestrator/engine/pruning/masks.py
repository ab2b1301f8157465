"""Choice of the weights that are pruned, by magnitude. Ties go by position, so the choice is the same on all ranks.

Shape legend: N = elements of a matrix, R, C = its rows and columns, G = groups of four, U = units of a structure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.spec.pruning import OF_FOUR

KEPT_OF_FOUR = 2


def smallest(magnitudes_N: Tensor, count: int) -> Tensor:
    """Which are the smallest so many, bool (N,)."""
    if count == 0:
        return torch.zeros_like(magnitudes_N, dtype=torch.bool)
    limit = magnitudes_N.topk(count, largest=False, sorted=False).values.max()
    below_N, at_N = magnitudes_N < limit, magnitudes_N == limit
    return below_N | (at_N & (at_N.cumsum(0) <= count - below_N.sum()))


def smallest_of_four(weights_RC: Tensor, count: int) -> Tensor:
    """Which are the smallest so many among the smaller two of each four neighbours of a row, bool (N,). With half of
    all elements that is every candidate: the pattern 2:4 (Mishra et al., arXiv:2104.08378).

    Args:
        weights_RC: C is a multiple of 4.
    """
    magnitudes_G4 = weights_RC.abs().reshape(-1, OF_FOUR)
    order_G4 = magnitudes_G4.argsort(dim=1, stable=True)
    kept_G2 = order_G4[:, OF_FOUR - KEPT_OF_FOUR :]
    candidates_G4 = magnitudes_G4.scatter(1, kept_G2, float("inf"))
    return smallest(candidates_G4.flatten(), count)


def weakest_units(parts: Sequence[Tensor], count: int) -> Tensor:
    """Which units have the smallest norms over all their weights, bool (U,).

    Args:
        parts: [P, U, Q] each. Sums are made in fp64, in memory of their own, as they may have other bits at another
            alignment, and rounded, so that processors that add up in another order agree.
    """
    squares_U = torch.stack([part.to(torch.float64, copy=True).square().sum((0, 2)) for part in parts]).sum(0)
    return smallest(squares_U.float(), count)
