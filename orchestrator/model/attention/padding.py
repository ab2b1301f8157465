"""Conversion between padded rows and the unpadded tokens of rows of unequal length.

Shape legend: B = rows, T = tokens of the longest row, N = tokens of all rows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Positions of the tokens of unequal rows once the rows are padded to the longest.

    Args:
        shape: (B, T).
        place_N: position of each token, row * T + column.
    """

    shape: tuple[int, int]
    place_N: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, length: int) -> Self:
        """Padding of rows of T = `length`, with `lengths_B` tokens each and padding after them."""
        real_BT = torch.arange(length, device=lengths_B.device) < lengths_B[:, None]
        return cls((len(lengths_B), length), real_BT.reshape(-1).nonzero()[:, 0])

    def pad(self, x_NAS: Tensor) -> Tensor:
        """(N, ...) to (B, T, ...), with zeros as padding."""
        rows, length = self.shape
        padded = x_NAS.new_zeros(rows * length, *x_NAS.shape[1:]).index_copy(0, self.place_N, x_NAS)
        return padded.view(rows, length, *x_NAS.shape[1:])

    def unpad(self, x_BTAS: Tensor) -> Tensor:
        """(B, T, ...) to (N, ...)."""
        return x_BTAS.flatten(0, 1)[self.place_N]
