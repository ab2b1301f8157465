"""Dispatch over an uneven all-to-all of rows: a token, and its gates for the receiver's experts.

The receiver sums the outputs of its experts for a row, each times its gate, and sends back one result per row. Which
rows there are, and how a token's results are added up, is left to subclasses.

The host waits for a GPU once: for the sizes of the exchange, which all come together.

Shape legend: N = local tokens, K = experts per token, S = rows sent, M = rows received, R = copies that are computed,
D = hidden size, E = experts, W = world size, L = experts of the rank that holds most of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.comm.tokens.all_to_all import AsyncAllToAll, exchange_counts
from orchestrator.model.moe.dispatcher import ExchangeSizes, ExpertInput
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.protocol.usage import TrafficKind


@dataclass(frozen=True)
class TokenRows(ABC):
    """The rows that a rank sends: for rank 0, then for rank 1, and so on.

    Args:
        token_S: the token of each row.
        gates_SL: its gates for the receiver's experts, in their order; 0 for experts that the row isn't for. A chosen
            expert with a gate of 0 adds nothing, to no gradient either.
    """

    token_S: Tensor
    gates_SL: Tensor

    @abstractmethod
    def spread(self, x_ND: Tensor) -> Tensor:
        """Tokens (N, D) to rows (S, D)."""

    @abstractmethod
    def add_up(self, results_SD: Tensor, shared_ND: Tensor | None) -> Tensor:
        """Results (S, D) to tokens (N, D), plus `shared_ND` if there is one."""


class TokenChoice(ABC):
    """A choice of experts, before it is known how many rows it makes.

    Attributes:
        counts_W2: for each rank the rows that it is sent, and the copies that its experts compute of them.
    """

    counts_W2: Tensor

    @abstractmethod
    def rows(self, num_rows: int) -> TokenRows:
        """The rows, of which there are `num_rows` by `counts_W2`."""


class RowDispatcher(nn.Module, ABC):
    """A `TokenDispatcher` over all ranks.

    Args:
        home: placement of the experts, seen from this rank.
        has_gaps: whether a choice may be none.

    Attributes:
        column_E: by expert, its place among all ranks' experts; with gaps also of none, behind all.
    """

    column_E: Tensor

    def __init__(self, home: ExpertParallelContext, has_gaps: bool = False) -> None:
        super().__init__()
        held = [home.placement.experts_of(rank, home.layer) for rank in range(home.placement.world_size)]
        self.home, self.num_columns, self.has_gaps = home, max(map(len, held)), has_gaps
        columns = [to * self.num_columns + held[to].index(expert) for expert, to in enumerate(home.destinations)]
        columns += [len(held) * self.num_columns] * has_gaps
        self.register_buffer("column_E", torch.tensor(columns), persistent=False)

    @abstractmethod
    def choice(self, expert_ids_NK: Tensor, gates_NK: Tensor) -> TokenChoice:
        """A choice of experts, in this dispatcher's rows."""

    @abstractmethod
    def batches(self, received_W: list[int]) -> list[int]:
        """Sizes of the batches into which received rows are split, given the rows from each rank."""

    def dispatch(
        self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor, sizes: ExchangeSizes | None = None
    ) -> "RowExchange":
        choice, home = self.choice(expert_ids_NK, gates_NK), self.home
        sizes = sizes or self._sizes(choice.counts_W2)
        rows = choice.rows(sum(sizes.sent_W))
        group, wire, columns, is_far_W = home.group, home.wire, self.num_columns, home.is_far_W
        there = AsyncAllToAll(sizes.sent_W, sizes.received_W, group, TrafficKind.DISPATCH, wire, columns, is_far_W)
        back = AsyncAllToAll(sizes.received_W, sizes.sent_W, group, TrafficKind.COMBINE, wire, is_far_W=is_far_W)
        on_the_way = there.begin(torch.cat([rows.spread(x_ND), rows.gates_SL], dim=1))
        return RowExchange(self, rows, sizes, there, back, on_the_way)

    def _sizes(self, sent_W2: Tensor) -> ExchangeSizes:
        """Sizes from counts by rank; the other ranks' counts are received meanwhile. Collective."""
        arriving_W2 = sent_W2 if self.home.group is None else exchange_counts(sent_W2, self.home.group)
        counts_3W = torch.stack([sent_W2[:, 0], arriving_W2[:, 0], arriving_W2[:, 1]])
        sent_W, received_W, copies_W = counts_3W.tolist()
        return ExchangeSizes(sent_W, received_W, sum(copies_W))

    def expert_input(self, received: Tensor, batches: list[int], num_copies: int) -> ExpertInput:
        """The work in received rows (M, D + L), which are `batches` and make `num_copies` copies."""
        x_MD, gates_ML = torch.split(received, [received.shape[1] - self.num_columns, self.num_columns], dim=1)
        gates_LM = gates_ML[:, : len(self.home.local_experts)].t()
        chosen_LM = gates_LM != 0
        place_R = torch.nonzero_static(chosen_LM.reshape(-1), size=num_copies).squeeze(1)
        row_R = place_R % max(len(received), 1)
        by_batch = [chosen.sum(1) for chosen in torch.split(chosen_LM, batches, dim=1)]
        counts = torch.stack(by_batch, dim=1).reshape(-1)
        return ExpertInput(x_MD, row_R, counts, gates_LM.reshape(-1).index_select(0, place_R), len(batches))


@dataclass(frozen=True)
class RowExchange:
    dispatcher: RowDispatcher
    rows: TokenRows
    sizes: ExchangeSizes
    there: AsyncAllToAll
    back: AsyncAllToAll
    on_the_way: Tensor

    def dispatched(self) -> ExpertInput:
        received = self.there.end(self.on_the_way)
        return self.dispatcher.expert_input(
            received, self.dispatcher.batches(self.sizes.received_W), self.sizes.num_copies
        )

    def combine(self, results_MD: Tensor) -> Tensor:
        return self.back.begin(results_MD)

    def combined(self, on_the_way: Tensor, shared_ND: Tensor | None) -> Tensor:
        return self.rows.add_up(self.back.end(on_the_way), shared_ND)
