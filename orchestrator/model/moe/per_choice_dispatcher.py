"""Dispatch with bits that don't depend on the world: each choice of a token is a row, and no product mixes ranks.

The token's own rank adds up the results in the order of the choices. So outputs and gradients are the same whichever
experts share a rank, and the operations are those of a world of one.

Shape legend: N = local tokens, K = experts per token at most, R = N * K choices, S = rows sent, one per choice,
D = hidden size, W = world size, L = experts of the rank that holds most of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.model.moe.routing.counting import count
from orchestrator.model.moe.row_dispatcher import RowDispatcher, TokenChoice, TokenRows


class PerChoiceDispatcher(RowDispatcher):
    """A `TokenDispatcher` for exact runs."""

    def choice(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> "PerChoice":
        column_S, order_S = self.column_E[expert_ids_NK.reshape(-1)].sort(stable=True)
        num_choices = len(order_S)
        if self.has_gaps:  # which come last; a GPU is waited for
            num_rows = int((expert_ids_NK < self.home.placement.num_experts).sum())
            column_S, order_S = column_S[:num_rows], order_S[:num_rows]
        to_S = column_S.div(self.num_columns, rounding_mode="floor")
        gates_S1 = gates_NK.reshape(-1).index_select(0, order_S)[:, None]
        gates_SL = gates_NK.new_zeros(len(order_S), self.num_columns)
        gates_SL = gates_SL.scatter(1, (column_S % self.num_columns)[:, None], gates_S1)
        token_S = order_S.div(expert_ids_NK.shape[1], rounding_mode="floor")
        # The row of each choice; of none that behind all, in whose place `_sums` puts zeros.
        row_R = order_S.new_full((num_choices,), len(order_S))
        row_R.scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        sent_W = count(to_S, self.home.placement.world_size)
        copies_W = torch.zeros_like(sent_W).scatter_add_(0, to_S, (gates_S1 != 0).long().squeeze(1))
        rows = PerChoiceRows(token_S, gates_SL, row_R.view_as(expert_ids_NK).t().contiguous())
        return PerChoice(rows, torch.stack([sent_W, copies_W], dim=1))

    def batches(self, received_W: list[int]) -> list[int]:
        return received_W


@dataclass(frozen=True)
class PerChoice(TokenChoice):
    all_rows: "PerChoiceRows"
    counts_W2: Tensor

    def rows(self, num_rows: int) -> "PerChoiceRows":
        return self.all_rows


@dataclass(frozen=True)
class PerChoiceRows(TokenRows):
    """Rows for one rank are by expert, then by token.

    Args:
        row_KN: the row of each choice of each token.
    """

    row_KN: Tensor

    def spread(self, x_ND: Tensor) -> Tensor:
        x_SD: Tensor = _Spread.apply(x_ND, self.token_S, self.row_KN)  # type: ignore[no-untyped-call]
        return x_SD

    def add_up(self, results_SD: Tensor, shared_ND: Tensor | None) -> Tensor:
        y_ND: Tensor = _AddUp.apply(results_SD, self.token_S, self.row_KN)  # type: ignore[no-untyped-call]
        return y_ND if shared_ND is None else y_ND + shared_ND


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_S: Tensor, row_KN: Tensor) -> Tensor:
        ctx.row_KN = row_KN
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sums(grads[0], ctx.row_KN), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, token_S: Tensor, row_KN: Tensor) -> Tensor:
        ctx.token_S = token_S
        return _sums(x_SD, row_KN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.token_S), None, None


def _sums(x_SD: Tensor, row_KN: Tensor) -> Tensor:
    """Per token, the sum of its rows in the order of its choices. The row behind all is one of zeros."""
    if len(x_SD) < row_KN.numel():
        x_SD = torch.cat([x_SD, x_SD.new_zeros(1, x_SD.shape[1])])
    first_N, *others = row_KN
    total_ND = x_SD.index_select(0, first_N)
    for other_N in others:
        total_ND.add_(x_SD.index_select(0, other_N))
    return total_ND
