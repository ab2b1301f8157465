"""Dispatch of each token once to every rank that holds experts of its choice: copies for one rank travel as one row.

Shape legend: N = local tokens, K = experts per token, S = rows sent, D = hidden size, W = world size, L = experts of
the rank that holds most of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.model.moe.row_dispatcher import RowDispatcher, TokenChoice, TokenRows


class PerRankDispatcher(RowDispatcher):
    """A `TokenDispatcher` that sends the fewest bytes."""

    def choice(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> "PerRank":
        num_tokens, size, columns = len(expert_ids_NK), self.home.placement.world_size, self.num_columns
        column_NK, gaps = self.column_E[expert_ids_NK], int(self.has_gaps)
        goes_NW = torch.zeros(num_tokens, size + gaps, dtype=torch.bool, device=expert_ids_NK.device)
        goes_NW = goes_NW.scatter_(1, column_NK.div(columns, rounding_mode="floor"), True)[:, :size]
        gates_NWL = gates_NK.new_zeros(num_tokens, size * columns + gaps).scatter(1, column_NK, gates_NK)
        gates_NWL = gates_NWL[:, : size * columns]
        copies_W = (gates_NWL.detach() != 0).sum(0).view(size, columns).sum(1)
        return PerRank(
            goes_NW, gates_NWL.reshape(num_tokens * size, columns), torch.stack([goes_NW.sum(0), copies_W], 1)
        )

    def batches(self, received_W: list[int]) -> list[int]:
        return [sum(received_W)]


@dataclass(frozen=True)
class PerRank(TokenChoice):
    """
    Args:
        goes_NW: whether a token goes to a rank.
        gates_NWL: its gates for the rank's experts, (N * W, L).
    """

    goes_NW: Tensor
    gates_NWL: Tensor
    counts_W2: Tensor

    def rows(self, num_rows: int) -> "PerRankRows":
        num_tokens, size = self.goes_NW.shape
        to_S, token_S = torch.nonzero_static(self.goes_NW.t(), size=num_rows).unbind(1)
        gates_SL = self.gates_NWL.index_select(0, token_S * size + to_S)
        return PerRankRows(token_S, gates_SL, num_tokens)


@dataclass(frozen=True)
class PerRankRows(TokenRows):
    """Rows for one rank are in the order of the tokens."""

    num_tokens: int

    def spread(self, x_ND: Tensor) -> Tensor:
        return x_ND.index_select(0, self.token_S)

    def add_up(self, results_SD: Tensor, shared_ND: Tensor | None) -> Tensor:
        y_ND = results_SD.new_zeros(self.num_tokens, results_SD.shape[1]) if shared_ND is None else shared_ND
        return y_ND.index_add(0, self.token_S, results_SD)
