"""Which tokens go to which rank: each once to every rank that holds experts of its choice, with its gates for them.

The rank adds up what its experts make of a token, each times its gate, and sends back one result. So copies of a token
travel as one where their experts are together.

Shape legend: N = local tokens, K = experts per token, S = rows sent, M = rows received, R = copies that are computed,
E = experts, W = world size, L = experts of the rank that holds most of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.elastic.placement import Placement


@dataclass(frozen=True)
class Rows:
    """What a rank sends: rows for rank 0, then those for rank 1, and so on, each rank's in the order of the tokens.

    Args:
        token_S: the token of each row.
        gates_SL: its gates for the receiver's experts, in their order; 0 for those that it hasn't chosen. One that is
            chosen with a gate of 0 adds nothing, nor to any gradient.
        sent_W: rows for each rank.
    """

    token_S: Tensor
    gates_SL: Tensor
    sent_W: Tensor


class Dispatch:
    """The ways from one rank's tokens to all experts. Fixed for the life of a generation.

    Args:
        rank: this rank.
        destinations: by expert, the rank that its tokens go to.
    """

    def __init__(self, placement: Placement, rank: int, destinations: Sequence[int]) -> None:
        self.world_size = placement.world_size
        held = [placement.experts_of(other) for other in range(placement.world_size)]
        self.num_columns = max(map(len, held))
        self.num_local = len(held[rank])
        self._destination_E = torch.tensor(destinations)
        self._column_E = torch.tensor(
            [to * self.num_columns + held[to].index(expert) for expert, to in enumerate(destinations)]
        )

    def rows(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> Rows:
        num_tokens, size, columns = len(expert_ids_NK), self.world_size, self.num_columns
        goes_NW = torch.zeros(num_tokens, size, dtype=torch.bool, device=expert_ids_NK.device)
        goes_NW.scatter_(1, self._destination_E[expert_ids_NK], True)
        to_S, token_S = goes_NW.t().nonzero(as_tuple=True)
        gates_NWL = gates_NK.new_zeros(num_tokens, size * columns).scatter(1, self._column_E[expert_ids_NK], gates_NK)
        gates_SL = gates_NWL.view(num_tokens * size, columns).index_select(0, token_S * size + to_S)
        return Rows(token_S, gates_SL, goes_NW.sum(0))

    def copies(self, gates_ML: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """What this rank's experts compute of what has arrived, as `run_experts` takes it: the row of each copy (R), by
        expert and then in the rows' order, the number of copies for each expert, and their gates (R)."""
        gates_LM = gates_ML[:, : self.num_local].t()
        chosen_LM = gates_LM != 0
        place_R = chosen_LM.reshape(-1).nonzero().squeeze(1)
        row_R = place_R % max(len(gates_ML), 1)
        return row_R, chosen_LM.sum(1).tolist(), gates_LM.reshape(-1).index_select(0, place_R)
