"""Token dispatch: how tokens reach the ranks of their experts, and how results come back.

`dispatch` and `combine` begin a transfer, `dispatched` and `combined` wait for it: what `MoELayer` computes in between
overlaps with it, and its gradients with the transfer of gradients in the backward pass.

Shape legend: N = local tokens, K = experts per token, M = rows that this rank's experts read, R = copies that they
compute, D = hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ExpertInput:
    """Work for this rank's experts, as for `run_experts`.

    Args:
        x_MD: tokens.
        row_R: the row of each copy, by expert and then in the rows' order.
        counts: copies for each expert, by batch, int64.
        gates_R: weights of the copies.
        num_batches: consecutive parts of the rows; no product may mix them.
    """

    x_MD: Tensor
    row_R: Tensor
    counts: Tensor
    gates_R: Tensor
    num_batches: int = 1


@dataclass(frozen=True)
class ExchangeSizes:
    """What the host has to know of an exchange.

    Args:
        sent_W, received_W: rows for each rank, and from each.
        num_copies: copies of tokens that this rank's experts compute.
    """

    sent_W: list[int]
    received_W: list[int]
    num_copies: int


class TokenExchange(Protocol):
    """One pass of tokens to their experts and back. Each method is called once, in this order."""

    @property
    def sizes(self) -> ExchangeSizes | None:
        """Sizes for `dispatch` of the same choice again; None where the host knows them."""

    def dispatched(self) -> ExpertInput:
        """Wait for the tokens that chose this rank's experts."""

    def combine(self, results_MD: Tensor) -> Tensor:
        """Begin to send results, one per row received, to the tokens' ranks. Returns what `combined` takes."""

    def combined(self, on_the_way: Tensor, shared_ND: Tensor | None) -> Tensor:
        """Wait for the results of this rank's tokens. Returns their sums, plus `shared_ND` if there is one (N, D)."""


class TokenDispatcher(Protocol):
    """Routes from one rank's tokens to all experts. Fixed for the life of a generation.

    Dispatchers that are made with `has_gaps` take the number of experts for a choice of none, whose gate is 0.
    """

    def dispatch(
        self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor, sizes: ExchangeSizes | None = None
    ) -> TokenExchange:
        """Begin to send tokens to the experts that they chose.

        Args:
            sizes: of an earlier dispatch of the same choice, on all ranks. Else ranks exchange them, and on a GPU the
                host waits for them.
        """
