"""Dispatch of each token once to every rank that holds experts of its choice: copies for one rank travel as one row.

Shape legend: N = local tokens, K = experts per token, S = rows sent, D = hidden size, W = world size, L = experts of
the rank that holds most of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.moe.row_dispatcher import RowDispatcher, TokenRows


class PerRankDispatcher(RowDispatcher):
    """A `TokenDispatcher` that sends the fewest bytes."""

    def rows(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> "PerRankRows":
        num_tokens, size, columns = len(expert_ids_NK), self.home.placement.world_size, self.num_columns
        column_NK = self.column_E[expert_ids_NK]
        goes_NW = torch.zeros(num_tokens, size, dtype=torch.bool, device=expert_ids_NK.device)
        goes_NW.scatter_(1, column_NK.div(columns, rounding_mode="floor"), True)
        to_S, token_S = goes_NW.t().nonzero(as_tuple=True)
        gates_NWL = gates_NK.new_zeros(num_tokens, size * columns).scatter(1, column_NK, gates_NK)
        gates_SL = gates_NWL.view(num_tokens * size, columns).index_select(0, token_S * size + to_S)
        return PerRankRows(token_S, gates_SL, goes_NW.sum(0), num_tokens)

    def batches(self, received_W: list[int]) -> list[int]:
        return [sum(received_W)]


@dataclass(frozen=True)
class PerRankRows(TokenRows):
    """Rows for one rank are in the order of the tokens."""

    num_tokens: int

    def spread(self, x_ND: Tensor) -> Tensor:
        return x_ND.index_select(0, self.token_S)

    def add_up(self, results_SD: Tensor, shared_ND: Tensor | None) -> Tensor:
        y_ND = results_SD.new_zeros(self.num_tokens, results_SD.shape[1]) if shared_ND is None else shared_ND
        return y_ND.index_add(0, self.token_S, results_SD)
