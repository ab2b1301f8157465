"""The mixture-of-experts layer: experts spread unevenly over ranks, tokens sent to them and back.

Shape legend: B = rows, T = tokens in a row, N = local tokens, K = experts per token, D = hidden size, E = experts.
"""

import torch
from torch import Tensor

from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.model.moe.routing.router import Choice, Router, Routing
from orchestrator.model.moe.routing.selection import TopPSelection
from orchestrator.spec.model import ModelSpec


class MoELayer(RoutedExperts):
    """Routed experts plus shared ones.

    Args:
        spec: sizes and routing. The shared experts, which process every token, are fused into one MLP.
        home: placement of the experts, seen from this rank.
    """

    router: Router

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext) -> None:
        super().__init__(spec, home, Router(spec, home.limits(spec.num_experts_per_tok), home.keeps_saliency))
        shared = spec.n_shared_experts * spec.moe_intermediate_size
        self.shared = GatedMLP(spec.hidden_size, shared, spec.n_shared_experts) if shared else None

    @property
    def correction_bias_E(self) -> Tensor:
        return self.router.correction_bias_E

    @property
    def mass_offset_1(self) -> Tensor | None:
        selection = getattr(self.router, "selection", None)
        return selection.mass_offset_1 if isinstance(selection, TopPSelection) else None

    def forward(self, x_BTD: Tensor, context_BTD: Tensor | None = None) -> Tensor:
        """Outputs of the tokens' experts.

        Args:
            context_BTD: what the layer's attention has added to the tokens, for routers that read it
                (`model.router.scorer: context`).
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        context_ND = None if context_BTD is None else context_BTD.reshape(x_ND.shape)
        real_N = self.real_N
        if real_N is None:
            return self._mix(x_ND, context_ND).view_as(x_BTD)
        mixed_ND = self._mix(x_ND[real_N], None if context_ND is None else context_ND[real_N])
        return torch.zeros_like(x_ND).index_copy(0, real_N, mixed_ND).view_as(x_BTD)

    def _mix(self, x_ND: Tensor, context_ND: Tensor | None) -> Tensor:
        x_ND = self._needs_grad(x_ND)
        if not isinstance(self.router, Router):  # of a user's
            routing = self._counted(self.router(x_ND))
            return self._run(x_ND, routing.expert_ids_NK, routing.gates_NK.to(x_ND.dtype), self.shared)
        before = self._recomputed()
        if before is None:
            routing = self._counted(self.router(x_ND, context_ND))
        else:
            routing = self.router(x_ND, context_ND, Choice(before.expert_ids_NK, before.chosen_NK))
        gates_NK = routing.gates_NK.to(x_ND.dtype)
        return self._run(x_ND, routing.expert_ids_NK, gates_NK, self.shared, before, routing.chosen_NK)

    def _counted(self, routing: Routing) -> Routing:
        """The same routing, whose counts are kept for the step's."""
        self._count(routing.expert_ids_NK, routing.chosen_NK)
        self.last_margins_EM, self.last_masses_M = routing.margins_EM, routing.masses_M
        self.last_balance_loss = routing.balance_loss
        return routing
