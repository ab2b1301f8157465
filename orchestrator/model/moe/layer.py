"""The mixture-of-experts layer: experts spread unevenly over ranks, tokens sent to them and back, none dropped.

Experts are keyed by their global id, so a parameter's name identifies its expert on whichever rank it is.

Shape legend: B = rows, T = tokens in a row, N = local tokens, K = experts per token, M = rows that the experts read,
R = copies of tokens for the experts, D = hidden size, H = expert intermediate size, E = experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.model.moe.counting import count
from orchestrator.model.moe.dispatcher import ExchangeSizes, TokenDispatcher
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.model.moe.local_dispatcher import LocalDispatcher
from orchestrator.model.moe.per_choice_dispatcher import PerChoiceDispatcher
from orchestrator.model.moe.per_rank_dispatcher import PerRankDispatcher
from orchestrator.model.moe.router import Router, Routing
from orchestrator.spec.model import ModelSpec


class MoELayer(nn.Module):
    """Routed experts plus shared ones.

    Args:
        spec: sizes and routing. The shared experts, which process every token, are fused into one MLP.
        home: placement of the experts, seen from this rank.
    """

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext) -> None:
        super().__init__()
        num_experts, size, inner = spec.n_routed_experts, spec.hidden_size, spec.moe_intermediate_size
        self.num_experts = num_experts
        self.router = Router(spec, home.limits(spec.num_experts_per_tok))
        self.experts = nn.ModuleDict({str(expert): GatedMLP(size, inner) for expert in home.local_experts})
        self.shared = GatedMLP(size, spec.n_shared_experts * inner) if spec.n_shared_experts else None
        self.dispatcher, self._is_exact = _dispatcher_of(home), home.is_exact
        self.real_N: Tensor | None = None  # if given, indices of the tokens that aren't padding; only these are routed
        self.trains_experts = True  # of this rank or another
        self.last_counts_E: Tensor = torch.zeros(num_experts, dtype=torch.int64)
        self.last_margins_EM: Tensor | None = None
        self.last_balance_loss: Tensor | None = None
        self.counts_were_read = True  # since the last pass
        # By passes with gradients since counts were read, two at most: of several it is unknown which is recomputed.
        self._dispatched: tuple[_Dispatched, ...] = ()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.real_N is None:
            return self._mix(x_ND).view_as(x_BTD)
        return torch.zeros_like(x_ND).index_copy(0, self.real_N, self._mix(x_ND[self.real_N])).view_as(x_BTD)

    def _mix(self, x_ND: Tensor) -> Tensor:
        """Outputs of the routed and the shared experts. The latter are computed during the transfers, half during each,
        in the backward pass too: the order of these lines is that of autograd.

        Ranks exchange gradients of tokens for experts that are trained. So tokens need a gradient then on every rank,
        also where nothing before this layer is trained and none of the rank's own experts is."""
        if self.trains_experts and torch.is_grad_enabled() and not x_ND.requires_grad:
            x_ND = x_ND.detach().requires_grad_()
        before = self._recomputed()
        routing = self._route(x_ND) if before is None else self.router(x_ND, before.expert_ids_NK)
        ids_NK, gates_NK = routing.expert_ids_NK, routing.gates_NK.to(x_ND.dtype)
        exchange = self.dispatcher.dispatch(x_ND, ids_NK, gates_NK, None if before is None else before.sizes)
        self._keep(_Dispatched(ids_NK, exchange.sizes))
        inner_NH = None if self.shared is None else self.shared.inner(x_ND)
        received = exchange.dispatched()

        experts: list[GatedMLP] = [e for e in self.experts.values() for _ in range(received.num_batches)]  # type: ignore[misc]
        results_MD = run_experts(
            received.x_MD, received.row_R, received.counts, experts, received.gates_R, may_group=not self._is_exact
        )

        on_the_way = exchange.combine(results_MD)
        shared_ND = None if self.shared is None or inner_NH is None else self.shared.outer(inner_NH)
        return exchange.combined(on_the_way, shared_ND)

    def _recomputed(self) -> "_Dispatched | None":
        """What the pass that is computed again has dispatched; None in another pass, or where that isn't known."""
        is_known = _is_recomputed() and len(self._dispatched) == 1 and isinstance(self.router, Router)
        return self._dispatched[0] if is_known else None

    def _keep(self, dispatched: "_Dispatched") -> None:
        if torch.is_grad_enabled() and not _is_recomputed():
            earlier = () if self.counts_were_read else self._dispatched
            self._dispatched, self.counts_were_read = (*earlier, dispatched)[:2], False

    def _route(self, x_ND: Tensor) -> Routing:
        routing: Routing = self.router(x_ND)
        self.last_counts_E = count(routing.expert_ids_NK.reshape(-1), self.num_experts)
        self.last_margins_EM, self.last_balance_loss = routing.margins_EM, routing.balance_loss
        return routing


@dataclass(frozen=True)
class _Dispatched:
    """What a recomputed pass takes over: scores that a GPU computes again may differ in their last bits, and another
    choice would not fit the activations that were kept."""

    expert_ids_NK: Tensor
    sizes: ExchangeSizes | None


def _is_recomputed() -> bool:
    """Whether this is a forward pass within a backward pass, for activations that weren't kept."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint finds it out


def _dispatcher_of(home: ExpertParallelContext) -> TokenDispatcher:
    if home.is_exact:
        return PerChoiceDispatcher(home)
    return LocalDispatcher(home) if home.group is None else PerRankDispatcher(home)
