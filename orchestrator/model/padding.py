"""Rows of unequal length, with padding and without it.

Shape legend: B = rows, T = tokens of the longest row, N = tokens of all rows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Where the tokens of rows of unequal length lie once the rows are padded to the longest.

    Args:
        shape: (B, T).
        place_N: of each token, row * T + column.
    """

    shape: tuple[int, int]
    place_N: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, length: int) -> Self:
        """Of rows of T = `length`, each of which has so many tokens and padding behind them."""
        real_BT = torch.arange(length, device=lengths_B.device) < lengths_B[:, None]
        return cls((len(lengths_B), length), real_BT.reshape(-1).nonzero()[:, 0])

    def pad(self, x_NAS: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), zeros between."""
        rows, length = self.shape
        padded = x_NAS.new_zeros(rows * length, *x_NAS.shape[1:]).index_copy(0, self.place_N, x_NAS)
        return padded.view(rows, length, *x_NAS.shape[1:])

    def unpad(self, x_BTAS: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        return x_BTAS.flatten(0, 1)[self.place_N]
