"""Experts spread unevenly over ranks: tokens that a router of any kind has routed are sent to them and back.

Experts are keyed by their global id, so a parameter's name identifies its expert on whichever rank it is.

Shape legend: N = local tokens, K = experts per token, M = rows that the experts read, R = copies of tokens for the
experts, D = hidden size, H = expert intermediate size, E = experts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.model.moe.dispatcher import ExchangeSizes, TokenDispatcher
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import MATRICES, GatedMLP, run_experts
from orchestrator.model.moe.local_dispatcher import LocalDispatcher
from orchestrator.model.moe.per_choice_dispatcher import PerChoiceDispatcher
from orchestrator.model.moe.per_rank_dispatcher import PerRankDispatcher
from orchestrator.model.moe.routing.counting import count_experts
from orchestrator.spec.model import ModelSpec


class RoutedExperts(nn.Module, ABC):
    """The routed experts of a layer, as one rank holds them. Subclasses route, and have a forward pass.

    Args:
        spec: sizes.
        home: placement of the experts, seen from this rank.
        router: of a layer that has one of its own.

    Attributes:
        real_N: if given, indices of the tokens that aren't padding; only these are routed.
        expert_parts: names of an expert's parameters, also on a rank that holds no expert.
        trains_experts: whether experts are trained, of this rank or another.
        keeps_saliency: whether norms of the experts' outputs are summed, in `last_norms_E`.
        last_num_tokens, last_counts_E, last_dropped, last_margins_EM, last_masses_M, last_balance_loss: of the last
            pass.
    """

    def __init__(self, spec: ModelSpec, home: ExpertParallelContext, router: nn.Module | None = None) -> None:
        super().__init__()
        if router is not None:
            self.router = router
        self.num_experts = spec.n_routed_experts
        size, inner = spec.hidden_size, spec.moe_intermediate_size
        self.experts = nn.ModuleDict({str(expert): GatedMLP(size, inner) for expert in home.local_experts})
        adapted = spec.lora.matrices if spec.lora is not None else frozenset[str]()
        self.expert_parts = (
            *MATRICES,
            *(f"lora.{name}.{part}" for name in MATRICES if name in adapted for part in "AB"),
        )
        self.dispatcher, self._is_exact = _dispatcher_of(home, spec.has_gaps), home.is_exact
        self._has_gaps, self.keeps_saliency, self._local = spec.has_gaps, home.keeps_saliency, home.local_experts
        self.last_norms_E = torch.zeros(self.num_experts if self.keeps_saliency else 0, dtype=torch.int64)
        self.real_N: Tensor | None = None
        self.trains_experts = True
        self.last_counts_E: Tensor = torch.zeros(self.num_experts, dtype=torch.int64)
        self.last_num_tokens, self.last_dropped = 0, torch.zeros((), dtype=torch.int64)
        self.last_margins_EM: Tensor | None = None
        self.last_masses_M: Tensor | None = None
        self.last_balance_loss: Tensor | None = None
        self.counts_were_read = True  # since the last pass
        # By passes with gradients since counts were read, two at most: of several it is unknown which is recomputed.
        self._dispatched: tuple[Dispatched, ...] = ()

    @property
    @abstractmethod
    def correction_bias_E(self) -> Tensor | None:
        """The bias on scores by which experts are chosen, which training moves (`model.bias_update_speed`); None: the
        router has none."""

    @property
    def mass_offset_1(self) -> Tensor | None:
        """The offset of the threshold of `top_p` (`orchestrator.model.moe.routing.selection`); None: there is none."""
        return None

    def _needs_grad(self, x_ND: Tensor) -> Tensor:
        """The tokens, so that a backward pass reaches them: ranks exchange gradients of tokens for experts that are
        trained. So tokens need a gradient then on every rank, also where nothing before this layer is trained and none
        of the rank's own experts is."""
        is_cut = self.trains_experts and torch.is_grad_enabled() and not x_ND.requires_grad
        return x_ND.detach().requires_grad_() if is_cut else x_ND

    def _run(
        self,
        x_ND: Tensor,
        ids_NK: Tensor,
        gates_NK: Tensor,
        shared: GatedMLP | None = None,
        before: "Dispatched | None" = None,
        chosen_NK: Tensor | None = None,
    ) -> Tensor:
        """Outputs of the routed experts, times their gates, and of the shared ones. The latter are computed during the
        transfers, half during each, in the backward pass too: the order of these lines is that of autograd.

        Args:
            before: what the pass that is computed again has dispatched.
            chosen_NK: the choices of which a capacity left `ids_NK`.
        """
        exchange = self.dispatcher.dispatch(x_ND, ids_NK, gates_NK, None if before is None else before.sizes)
        self._keep(Dispatched(ids_NK, exchange.sizes, chosen_NK))
        inner_NH = None if shared is None else shared.inner(x_ND)
        received = exchange.dispatched()

        experts: list[GatedMLP] = [e for e in self.experts.values() for _ in range(received.num_batches)]  # type: ignore[misc]
        counts = self.keeps_saliency and self.training and torch.is_grad_enabled() and not is_recomputed()
        norms_L = torch.zeros(len(experts), dtype=torch.int64, device=x_ND.device) if counts else None
        results_MD = run_experts(
            received.x_MD, received.row_R, received.counts, experts, received.gates_R, not self._is_exact, norms_L
        )
        if norms_L is not None:
            self._keep_norms(norms_L.view(len(self._local), received.num_batches).sum(1))

        on_the_way = exchange.combine(results_MD)
        shared_ND = None if shared is None or inner_NH is None else shared.outer(inner_NH)
        return exchange.combined(on_the_way, shared_ND)

    def _recomputed(self) -> "Dispatched | None":
        """What the pass that is computed again has dispatched; None in another pass, or where that isn't known."""
        return self._dispatched[0] if is_recomputed() and len(self._dispatched) == 1 else None

    def _keep(self, dispatched: "Dispatched") -> None:
        if torch.is_grad_enabled() and not is_recomputed():
            earlier = () if self.counts_were_read else self._dispatched
            self._dispatched, self.counts_were_read = (*earlier, dispatched)[:2], False

    def _keep_norms(self, norms_l: Tensor) -> None:
        """Keep the sums of this rank's experts, those of others being 0."""
        self.last_norms_E = norms_l.new_zeros(self.num_experts)
        self.last_norms_E[list(self._local)] = norms_l

    def _count(self, ids_NK: Tensor, chosen_NK: Tensor | None = None) -> None:
        """Count the choices of tokens, and those of which only `ids_NK` are left."""
        chosen_NK = ids_NK if chosen_NK is None else chosen_NK
        self.last_counts_E = count_experts(chosen_NK, self.num_experts, self._has_gaps)
        self.last_num_tokens = len(ids_NK)
        if chosen_NK is not ids_NK:
            self.last_dropped = (chosen_NK != ids_NK).sum()


@dataclass(frozen=True)
class Dispatched:
    """What a recomputed pass takes over: scores that a GPU computes again may differ in their last bits, and another
    choice would not fit the activations that were kept."""

    expert_ids_NK: Tensor
    sizes: ExchangeSizes | None
    chosen_NK: Tensor | None = None


def is_recomputed() -> bool:
    """Whether this is a forward pass within a backward pass, for activations that weren't kept."""
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint finds it out


def _dispatcher_of(home: ExpertParallelContext, has_gaps: bool) -> TokenDispatcher:
    if home.is_exact:
        return PerChoiceDispatcher(home, has_gaps)
    return LocalDispatcher(home, has_gaps) if home.group is None else PerRankDispatcher(home, has_gaps)
