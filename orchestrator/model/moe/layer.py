"""The mixture-of-experts layer: experts spread unevenly over ranks, tokens sent to them and back, none dropped.

Shape legend: B = rows, T = tokens in a row, N = local tokens, K = experts per token, D = hidden size, E = experts.
"""

import torch
from torch import Tensor

from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.moe.routing.router import Router, Routing
from orchestrator.spec.model import ModelSpec


class MoELayer(RoutedExperts):
    """Routed experts plus shared ones.

    Args:
        spec: sizes and routing. The shared experts, which process every token, are fused into one MLP.
        home: placement of the experts, seen from this rank.
    """

    router: Router

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext) -> None:
        super().__init__(spec, home, Router(spec, home.limits(spec.num_experts_per_tok)))
        shared = spec.n_shared_experts * spec.moe_intermediate_size
        self.shared = GatedMLP(spec.hidden_size, shared) if shared else None

    @property
    def correction_bias_E(self) -> Tensor:
        return self.router.correction_bias_E

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.real_N is None:
            return self._mix(x_ND).view_as(x_BTD)
        return torch.zeros_like(x_ND).index_copy(0, self.real_N, self._mix(x_ND[self.real_N])).view_as(x_BTD)

    def _mix(self, x_ND: Tensor) -> Tensor:
        x_ND = self._needs_grad(x_ND)
        before = self._recomputed() if isinstance(self.router, Router) else None
        routing = self._route(x_ND) if before is None else self.router(x_ND, before.expert_ids_NK)
        return self._run(x_ND, routing.expert_ids_NK, routing.gates_NK.to(x_ND.dtype), self.shared, before)

    def _route(self, x_ND: Tensor) -> Routing:
        routing: Routing = self.router(x_ND)
        self._count(routing.expert_ids_NK)
        self.last_margins_EM, self.last_balance_loss = routing.margins_EM, routing.balance_loss
        return routing
