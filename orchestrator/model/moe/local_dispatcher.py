"""Dispatch in a world of one: nothing is sent, and experts read the tokens in place.

Shape legend: N = tokens, K = experts per token, R = N * K copies, D = hidden size.
"""

from dataclasses import dataclass

from torch import Tensor

from orchestrator.model.moe.dispatcher import ExchangeSizes, ExpertInput
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.routing.counting import count_experts


class LocalDispatcher:
    """A `TokenDispatcher` for a rank that holds all experts."""

    def __init__(self, home: ExpertParallelContext, has_gaps: bool = False) -> None:
        self._num_experts, self._has_gaps = home.placement.num_experts, has_gaps

    def dispatch(
        self, x_ND: Tensor, expert_ids_NK: Tensor, gates_NK: Tensor, sizes: ExchangeSizes | None = None
    ) -> "LocalExchange":
        ids_R = expert_ids_NK.reshape(-1)
        order_R = ids_R.argsort(stable=True)
        counts = count_experts(ids_R, self._num_experts, self._has_gaps)
        if self._has_gaps:  # which come last; a GPU is waited for
            order_R = order_R[: int(counts.sum())]
        token_R = order_R.div(expert_ids_NK.shape[1], rounding_mode="floor")
        return LocalExchange(ExpertInput(x_ND, token_R, counts, gates_NK.reshape(-1)[order_R]))


@dataclass(frozen=True)
class LocalExchange:
    received: ExpertInput
    sizes: ExchangeSizes | None = None

    def dispatched(self) -> ExpertInput:
        return self.received

    def combine(self, results_ND: Tensor) -> Tensor:
        return results_ND

    def combined(self, on_the_way: Tensor, shared_ND: Tensor | None) -> Tensor:
        return on_the_way if shared_ND is None else on_the_way + shared_ND
