"""The router: scores for every expert, top-k by score plus a correction bias, gates normalised over the chosen.

Two kinds. Sigmoid scores are balanced without an auxiliary loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2):
the bias affects the selection only, and changes after each update (`orchestrator.model.moe.routing.balance`) by the counts of
the whole global batch. Softmax scores are balanced by an auxiliary loss (Switch Transformer, arXiv:2101.03961, section
2.2), computed over each micro-batch, so that it doesn't depend on the world size. Either may be limited to the experts
of the best groups (DeepSeek-V2, arXiv:2405.04434, section 2.2.2; by the sum of a group's best scores as in V3, section
2.1.2).

Shape legend: N = tokens, D = hidden size, E = experts, K = experts per token, M = bins of margins, G = groups of
experts, e = experts of the largest group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.moe.routing.balance import margin_histogram, margins
from orchestrator.model.moe.counting import count
from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class Routing:
    """The routing of some tokens.

    Args:
        expert_ids_NK: chosen experts, global ids.
        gates_NK: weights of their outputs; with `norm_topk_prob` they sum to the scaling factor per token.
        balance_loss: to be added to the sum of the tokens' losses; None if there is no auxiliary loss.
        margins_EM: histogram of the tokens by their margin at each expert; None if not counted.
    """

    expert_ids_NK: Tensor
    gates_NK: Tensor
    balance_loss: Tensor | None = None
    margins_EM: Tensor | None = None


class Limit(nn.Module):
    """Limits each token to the experts of its best groups.

    Args:
        groups: by expert, its group, by any name.
        top: number of groups that a token may visit.
        best: a group's score is the sum of its `best` highest expert scores.
    """

    member_Ge: Tensor
    group_E: Tensor

    def __init__(self, groups: Sequence[int | str], top: int, best: int) -> None:
        super().__init__()
        members = [[e for e, mine in enumerate(groups) if mine == group] for group in dict.fromkeys(groups)]
        size, padding = max(map(len, members)), len(groups)
        self.top, self._best = min(top, len(members)), min(best, size)
        member_Ge = torch.tensor([mine + [padding] * (size - len(mine)) for mine in members])
        group_E = torch.tensor([next(g for g, mine in enumerate(members) if e in mine) for e in range(len(groups))])
        self.register_buffer("member_Ge", member_Ge, persistent=False)
        self.register_buffer("group_E", group_E, persistent=False)

    def forward(self, choice_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The scores with those outside of a token's best groups at -inf; and by expert the margin of its group: the
        excess over the best excluded group, or (at most 0) the deficit to the last admitted one."""
        padded_NE = F.pad(choice_NE, (0, 1), value=float("-inf"))
        choice_NGe = padded_NE[:, self.member_Ge]
        first_NG, *others = choice_NGe.topk(self._best, dim=-1).values.unbind(-1)
        goodness_NG = sum((other.masked_fill(other == float("-inf"), 0.0) for other in others), first_NG)
        best = goodness_NG.topk(self.top, dim=-1)
        is_best_NG = torch.zeros_like(goodness_NG).scatter_(1, best.indices, 1.0)
        limited_NE = choice_NE.masked_fill(is_best_NG[:, self.group_E] == 0, float("-inf"))
        last_in_N1 = best.values[:, -1:]
        first_out_N1 = goodness_NG.masked_fill(is_best_NG > 0, float("-inf")).amax(-1, keepdim=True)
        margin_NG = goodness_NG - torch.where(is_best_NG > 0, first_out_N1, last_in_N1)
        margin_NG = margin_NG.masked_fill(goodness_NG == float("-inf"), float("inf"))  # excluded by another limit
        return limited_NE, margin_NG[:, self.group_E]


class Router(nn.Module):
    """Scores every expert for every token, in fp32 at any precision of the model.

    Args:
        spec: kind, sizes, groups and the weight of the auxiliary loss.
        limits: by the placement of experts, in addition to the model's own.
    """

    correction_bias_E: Tensor

    def __init__(self, spec: ModelSpec, limits: Sequence[Limit] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.top_k = spec.num_experts_per_tok
        own = []
        if spec.n_group > 1:
            size = spec.n_routed_experts // spec.n_group
            own = [Limit([e // size for e in range(spec.n_routed_experts)], spec.topk_group, best=2)]
        self.limits = nn.ModuleList([*limits, *own])
        self.weight = nn.Parameter(torch.empty(spec.n_routed_experts, spec.hidden_size))
        self.register_buffer("correction_bias_E", torch.zeros(spec.n_routed_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            expert_ids_NK: given, the choice of an earlier pass, and nothing is counted.
        """
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.spec.scoring_func == "sigmoid" else logits_NE.softmax(-1)
        margins_EM = None
        if expert_ids_NK is None:
            expert_ids_NK, margins_EM = self._choose(scores_NE.detach())
        gates_NK = scores_NE.gather(1, expert_ids_NK)
        if self.spec.norm_topk_prob:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        gates_NK = gates_NK * self.spec.routed_scaling_factor
        weight = self.spec.router_aux_loss_coef
        loss = weight * balance_loss(scores_NE, expert_ids_NK) if self.spec.scoring_func == "softmax" and weight else None
        return Routing(expert_ids_NK, gates_NK, loss, margins_EM)

    def _choose(self, scores_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts of each token (N, K), and the histogram of its margins where it is counted."""
        biased_NE = scores_NE + self.correction_bias_E
        choice_NE, group_margins = biased_NE, []
        for limit in self.limits:
            choice_NE, margin_NE = limit(choice_NE)
            group_margins.append(margin_NE)
        if not (self.spec.counts_margins and self.training):
            return choice_NE.topk(self.top_k, dim=-1).indices, None
        best = choice_NE.topk(self.top_k + 1, dim=-1)
        margin_NE = margins(biased_NE, best.values)
        for margin_of_group_NE in group_margins:
            margin_NE = torch.minimum(margin_NE, margin_of_group_NE)
        # A copy of the ids, so that the backward pass doesn't keep the rest.
        return best.indices[:, : self.top_k].contiguous(), margin_histogram(margin_NE)


def balance_loss(scores_NE: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """N E sum_e f_e P_e: f is the share of choices that went to an expert, P its mean score (arXiv:2101.03961, eq. 4,
    times the number of tokens). Its minimum, N, is where both are uniform; 0 without tokens."""
    num_experts = scores_NE.shape[1]
    counts_E = count(expert_ids_NK.reshape(-1), num_experts).to(scores_NE.dtype)
    share_E = counts_E / max(expert_ids_NK.numel(), 1)
    return num_experts * (share_E * scores_NE.sum(0)).sum()
