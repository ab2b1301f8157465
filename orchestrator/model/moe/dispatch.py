"""Dispatch of tokens to ranks: each token once to every rank that holds experts of its choice, with its gates for them.

The rank sums the outputs of its experts for a token, each times its gate, and sends back one result. So copies of a
token for experts on one rank travel as one row. Where bits must not depend on which experts share a rank, each copy is
sent separately and the token's own rank sums the results.

Shape legend: N = local tokens, K = experts per token, S = rows sent, M = rows received, R = copies that are computed,
E = experts, W = world size, L = experts of the rank that holds most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.elastic.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class TokenRows:
    """The rows that a rank sends: for rank 0, then for rank 1, and so on, each in the order of the tokens.

    Args:
        token_S: the token of each row.
        gates_SL: its gates for the receiver's experts, in their order; 0 for experts that it hasn't chosen. A chosen
            expert with a gate of 0 adds nothing, to no gradient either.
        sent_W: rows for each rank.
    """

    token_S: Tensor
    gates_SL: Tensor
    sent_W: Tensor


class Dispatch:
    """Routes from one rank's tokens to all experts. Fixed for the life of a generation.

    Args:
        rank: this rank.
        destinations: by expert, the rank that computes this rank's tokens for it.
    """

    def __init__(self, placement: ExpertPlacement, rank: int, destinations: Sequence[int]) -> None:
        self.world_size = placement.world_size
        held = [placement.experts_of(other) for other in range(placement.world_size)]
        self.num_columns = max(map(len, held))
        self.num_local = len(held[rank])
        self._destination_E = torch.tensor(destinations)
        self._column_E = torch.tensor(
            [to * self.num_columns + held[to].index(expert) for expert, to in enumerate(destinations)]
        )

    def rows(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> TokenRows:
        num_tokens, size, columns = len(expert_ids_NK), self.world_size, self.num_columns
        goes_NW = torch.zeros(num_tokens, size, dtype=torch.bool, device=expert_ids_NK.device)
        goes_NW.scatter_(1, self._destination_E[expert_ids_NK], True)
        to_S, token_S = goes_NW.t().nonzero(as_tuple=True)
        gates_NWL = gates_NK.new_zeros(num_tokens, size * columns).scatter(1, self._column_E[expert_ids_NK], gates_NK)
        gates_SL = gates_NWL.view(num_tokens * size, columns).index_select(0, token_S * size + to_S)
        return TokenRows(token_S, gates_SL, goes_NW.sum(0))

    def rows_apart(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> tuple[TokenRows, Tensor]:
        """One row for each choice of a token, by rank, then by expert, then by token; and the index among the N * K
        choices of each row."""
        column_S, order_S = self._column_E[expert_ids_NK.reshape(-1)].sort(stable=True)
        token_S = order_S.div(expert_ids_NK.shape[1], rounding_mode="floor")
        to_S = column_S.div(self.num_columns, rounding_mode="floor")
        gates_S1 = gates_NK.reshape(-1).index_select(0, order_S)[:, None]
        gates_SL = gates_NK.new_zeros(len(order_S), self.num_columns)
        gates_SL = gates_SL.scatter(1, (column_S % self.num_columns)[:, None], gates_S1)
        return TokenRows(token_S, gates_SL, torch.bincount(to_S, minlength=self.world_size)), order_S

    def copies(self, gates_ML: Tensor, received_W: Sequence[int] | None = None) -> tuple[Tensor, list[int], Tensor]:
        """The received work for this rank's experts, as for `run_experts`: the row of each copy (R), by expert and then
        in the rows' order, the number of copies for each expert, and their gates (R).

        Args:
            received_W: rows from each rank; if given, numbers of copies are by expert and then by rank.
        """
        gates_LM = gates_ML[:, : self.num_local].t()
        chosen_LM = gates_LM != 0
        place_R = chosen_LM.reshape(-1).nonzero().squeeze(1)
        row_R = place_R % max(len(gates_ML), 1)
        by_rank = [chosen_LM] if received_W is None else torch.split(chosen_LM, list(received_W), dim=1)
        counts = torch.stack([chosen.sum(1) for chosen in by_rank], dim=1).reshape(-1).tolist()
        return row_R, counts, gates_LM.reshape(-1).index_select(0, place_R)


class PerChoiceRows:
    """Maps tokens to one row per choice, and sums results per token in the order of the choices: with the same bits
    wherever the experts are, forward and backward.

    Args:
        order_S: the index among the N * K choices of each row.
        top_k: K.
    """

    def __init__(self, order_S: Tensor, top_k: int) -> None:
        self._token_S = order_S.div(top_k, rounding_mode="floor")
        row_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        self._row_KN = row_S.view(len(order_S) // top_k, top_k).t().contiguous()

    def spread(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (S, D)."""
        x_SD: Tensor = _Spread.apply(x_ND, self)  # type: ignore[no-untyped-call]
        return x_SD

    def add_up(self, x_SD: Tensor) -> Tensor:
        """(S, D) to (N, D)."""
        x_ND: Tensor = _AddUp.apply(x_SD, self)  # type: ignore[no-untyped-call]
        return x_ND

    def to_rows(self, x_ND: Tensor) -> Tensor:
        return x_ND.index_select(0, self._token_S)

    def to_tokens(self, x_SD: Tensor) -> Tensor:
        first_N, *others = self._row_KN
        total_ND = x_SD.index_select(0, first_N)
        for other_N in others:
            total_ND.add_(x_SD.index_select(0, other_N))
        return total_ND


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, apart: PerChoiceRows) -> Tensor:
        ctx.apart = apart
        return apart.to_rows(x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.apart.to_tokens(grads[0]), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, apart: PerChoiceRows) -> Tensor:
        ctx.apart = apart
        return apart.to_tokens(x_SD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.apart.to_rows(grads[0]), None
