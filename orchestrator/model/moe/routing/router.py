"""The router: scores for every expert, a selection of experts for each token, gates normalised over the selected.

Three parts, each of a kind that the job chooses: a scorer (`orchestrator.model.moe.routing.scorers`), the function that
makes scores of its logits, and a selection (`orchestrator.model.moe.routing.selection`).

Sigmoid scores are balanced without an auxiliary loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): the bias
affects the selection only, and changes after each update (`orchestrator.model.moe.routing.balance`) by the counts of
the whole global batch. Softmax scores are balanced by an auxiliary loss (Switch Transformer, arXiv:2101.03961, section
2.2), computed over each micro-batch, so that it doesn't depend on the world size. Either may be limited to the experts
of the best groups (DeepSeek-V2, arXiv:2405.04434, section 2.2.2; by the sum of a group's best scores as in V3, section
2.1.2).

Shape legend: N = tokens, D = hidden size, E = experts, K = experts per token at most, M = bins of a histogram.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.model.moe.routing.counting import count
from orchestrator.model.moe.routing.limit import Limit, OneOfFamily
from orchestrator.model.moe.routing.scorers import scorer_of
from orchestrator.model.moe.routing.selection import capacity, selection_of, within_capacity
from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class Choice:
    """What tokens chose in an earlier pass. Arguments as of `Routing`."""

    expert_ids_NK: Tensor
    chosen_NK: Tensor | None


@dataclass(frozen=True)
class Routing:
    """The routing of some tokens.

    Args:
        expert_ids_NK: experts that they visit, global ids. Where `ModelSpec.has_gaps`, the number of experts stands for
            none.
        gates_NK: weights of their outputs; with `norm_topk_prob` they sum to the scaling factor per token, dropped
            choices included. 0 for none.
        balance_loss: to be added to the sum of the tokens' losses; None if there is no auxiliary loss.
        margins_EM: histogram of the tokens by their margin at each expert; None if not counted.
        masses_M: histogram of shares of scores by their excess over the threshold; None without one.
        chosen_NK: experts that the tokens chose, before a capacity dropped some; None: those that they visit.
    """

    expert_ids_NK: Tensor
    gates_NK: Tensor
    balance_loss: Tensor | None = None
    margins_EM: Tensor | None = None
    masses_M: Tensor | None = None
    chosen_NK: Tensor | None = None


class Router(nn.Module):
    """Scores every expert for every token, in fp32 at any precision of the model.

    Args:
        spec: kinds, sizes, groups and the weight of the auxiliary loss.
        limits: by the placement and the families of experts, in addition to the model's own.
        keeps_saliency: whether it has `saliency_E2`.

    Attributes:
        correction_bias_E: added to scores for the choice.
        saliency_E2: how much each expert has added lately (`orchestrator.model.moe.routing.saliency`).
    """

    correction_bias_E: Tensor
    saliency_E2: Tensor

    def __init__(
        self, spec: ModelSpec, limits: Sequence[Limit | OneOfFamily] = (), keeps_saliency: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        own: list[Limit] = []
        if spec.n_group > 1:
            size = spec.n_routed_experts // spec.n_group
            own = [Limit([e // size for e in range(spec.n_routed_experts)], spec.topk_group, best=2)]
        self.scorer, self.selection = scorer_of(spec), selection_of(spec, [*limits, *own])
        self.register_buffer("correction_bias_E", torch.zeros(spec.n_routed_experts, dtype=torch.float32))
        if keeps_saliency:
            self.register_buffer("saliency_E2", torch.zeros(spec.n_routed_experts, 2, dtype=torch.float32))

    def forward(self, x_ND: Tensor, context_ND: Tensor | None = None, before: Choice | None = None) -> Routing:
        """Route tokens.

        Args:
            context_ND: what attention has added to the tokens, for scorers that read it.
            before: given, the same choice as in an earlier pass, and nothing is counted.
        """
        spec, num_experts = self.spec, self.spec.n_routed_experts
        logits_NE = self.scorer(x_ND, context_ND)
        scores_NE = logits_NE.sigmoid() if spec.scoring_func == "sigmoid" else logits_NE.softmax(-1)
        margins_EM = masses_M = visited_NK = None
        if before is None:
            selected = self.selection(scores_NE.detach(), self.correction_bias_E, self.training)
            chosen_NK, margins_EM, masses_M = selected.expert_ids_NK, selected.margins_EM, selected.masses_M
        else:
            visited_NK = before.expert_ids_NK
            chosen_NK = visited_NK if before.chosen_NK is None else before.chosen_NK
        scores_NK = self._scores_of(scores_NE, chosen_NK)
        gates_NK = self._gates(scores_NK)
        factor = spec.router.capacity_factor
        if factor is None or not self.training:
            visited_NK = chosen_NK
        else:
            if visited_NK is None:
                most = capacity(len(x_ND), spec.num_experts_per_tok, num_experts, factor)
                visited_NK = within_capacity(chosen_NK, scores_NK.detach(), num_experts, most)
            gates_NK = gates_NK.masked_fill(visited_NK == num_experts, 0.0)
        weight = spec.router_aux_loss_coef
        loss = weight * balance_loss(scores_NE, chosen_NK) if spec.scoring_func == "softmax" and weight else None
        return Routing(visited_NK, gates_NK, loss, margins_EM, masses_M, chosen_NK)

    def _scores_of(self, scores_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """Scores of the choices, 0 of none."""
        if not self.spec.has_gaps:
            return scores_NE.gather(1, chosen_NK)
        is_none_NK = chosen_NK == self.spec.n_routed_experts
        return scores_NE.gather(1, chosen_NK.masked_fill(is_none_NK, 0)).masked_fill(is_none_NK, 0.0)

    def _gates(self, scores_NK: Tensor) -> Tensor:
        if self.spec.norm_topk_prob:
            scores_NK = scores_NK / (scores_NK.sum(-1, keepdim=True) + 1e-20)
        return scores_NK * self.spec.routed_scaling_factor


def balance_loss(scores_NE: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """N E sum_e f_e P_e: f is the share of choices that went to an expert, P its mean score (arXiv:2101.03961, eq. 4,
    times the number of tokens). Its minimum, N, is where both are uniform; 0 without tokens."""
    num_experts = scores_NE.shape[1]
    counts_E = count(expert_ids_NK.reshape(-1), num_experts + 1)[:num_experts].to(scores_NE.dtype)
    share_E = counts_E / counts_E.sum().clamp_min(1)
    return num_experts * (share_E * scores_NE.sum(0)).sum()
