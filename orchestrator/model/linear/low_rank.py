"""Low-rank adapters of matrices (LoRA, Hu et al., arXiv:2106.09685): x Wᵀ + s (x Aᵀ) Bᵀ, of which only A and B are
trained.

A matrix of several stacked ones has an adapter for each, whose A and B are stacked as well: peft has them as separate
modules.

Shape legend: X = any leading dimensions, C = rows, K = inputs, O = outputs, S = rank times stacked matrices, R = rank.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """The branch beside one matrix.

    Args:
        rank: of each stacked matrix's.
        scale: s.
        dropout: share of the inputs that are left out in training.
        blocks: stacked matrices.
    """

    def __init__(
        self, num_inputs: int, num_outputs: int, rank: int, scale: float, dropout: float = 0.0, blocks: int = 1
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(blocks * rank, num_inputs))
        self.B = nn.Parameter(torch.empty(num_outputs, rank))
        self.scale, self.dropout, self.blocks = scale, dropout, blocks

    def forward(self, x_XK: Tensor) -> Tensor:
        """What is added to the matrix's outputs."""
        inner_XS = F.linear(F.dropout(x_XK, self.dropout, self.training), self.A)
        parts = zip(inner_XS.chunk(self.blocks, -1), self.B.chunk(self.blocks), strict=True)
        return torch.cat([F.linear(inner_XR, B_OR) for inner_XR, B_OR in parts], -1) * self.scale

    def merged(self, weight_OK: Tensor) -> Tensor:
        """The matrix (O, K) with the adapter in it, in fp32."""
        return merged(weight_OK, self.A, self.B, self.scale)


def merged(weight_OK: Tensor, A_SK: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """A matrix with an adapter in it, in fp32."""
    blocks = len(A_SK) // B_OR.shape[1]
    parts = zip(B_OR.float().chunk(blocks), A_SK.float().chunk(blocks), strict=True)
    return weight_OK.float() + scale * torch.cat([B_oR @ A_RK for B_oR, A_RK in parts])


def add_outputs(y_CO: Tensor, x_CK: Tensor, A_SK: Tensor, B_OR: Tensor, scale: float) -> None:
    """Add an adapter's outputs to `y_CO`, in place."""
    for y_Co, inner_CR, B_oR in _by_block(y_CO, torch.mm(x_CK, A_SK.t()), B_OR):
        y_Co.addmm_(inner_CR, B_oR.t(), alpha=scale)


def add_input_gradient(dx_CK: Tensor, dy_CO: Tensor, A_SK: Tensor, B_OR: Tensor, scale: float) -> None:
    """Add the gradient of an adapter's inputs to `dx_CK`, in place."""
    dx_CK.addmm_(_inner_gradient(dy_CO, A_SK, B_OR), A_SK, alpha=scale)


def weight_gradients(dy_CO: Tensor, x_CK: Tensor, A_SK: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of A and B."""
    inner_CS, dB_OR = torch.mm(x_CK, A_SK.t()), torch.empty_like(B_OR)
    for dy_Co, inner_CR, dB_oR in _by_block(dy_CO, inner_CS, dB_OR):
        torch.mm(dy_Co.t(), inner_CR, out=dB_oR)
    return torch.mm(_inner_gradient(dy_CO, A_SK, B_OR).t(), x_CK).mul_(scale), dB_OR.mul_(scale)


def _inner_gradient(dy_CO: Tensor, A_SK: Tensor, B_OR: Tensor) -> Tensor:
    """The gradient (C, S) of x Aᵀ, without the scale."""
    dinner_CS = dy_CO.new_empty(len(dy_CO), len(A_SK))
    for dy_Co, dinner_CR, B_oR in _by_block(dy_CO, dinner_CS, B_OR):
        dinner_CR.copy_(torch.mm(dy_Co, B_oR))
    return dinner_CS


def _by_block(y_CO: Tensor, inner_CS: Tensor, B_OR: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The parts that belong to each stacked matrix."""
    blocks = inner_CS.shape[1] // B_OR.shape[1]
    return zip(y_CO.chunk(blocks, 1), inner_CS.chunk(blocks, 1), B_OR.chunk(blocks), strict=True)
