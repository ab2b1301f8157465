"""The router: scores for every expert, top-k by score plus a correction bias, gates normalised over the chosen.

Two kinds. Sigmoid scores are balanced without an auxiliary loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2):
the bias takes part in the selection only, and moves by a fixed speed against each expert's load, which is counted over
the whole global batch. Softmax scores are balanced by an auxiliary loss (Switch Transformer, arXiv:2101.03961, section
2.2), taken over each slot, so that it doesn't depend on the world size. Either may choose among the experts of the best
groups only (DeepSeek-V2, arXiv:2405.04434, section 2.2.2; by the sum of a group's two best scores as in V3).

Shape legend: N = tokens, D = hidden size, E = experts, K = experts per token, G = groups of experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.spec.model import ModelSpec


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Args:
        expert_ids_NK: chosen experts, global ids.
        gates_NK: weights of their outputs; sum to the scaling factor per token.
        balance_loss: to be added to the sum of the tokens' losses; None where balance needs no loss.
    """

    expert_ids_NK: Tensor
    gates_NK: Tensor
    balance_loss: Tensor | None = None


class Router(nn.Module):
    """Scores every expert for every token in fp32, whatever the precision of the model.

    Args:
        spec: kind, sizes, groups and the weight of the auxiliary loss.
    """

    correction_bias_E: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.top_k = spec.top_k
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.hidden_size))
        self.register_buffer("correction_bias_E", torch.zeros(spec.num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> Routing:
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.spec.router == "sigmoid" else logits_NE.softmax(-1)
        choice_NE = scores_NE.detach() + self.correction_bias_E
        if self.spec.num_expert_groups > 1:
            choice_NE = best_groups_only(choice_NE, self.spec.num_expert_groups, self.spec.top_k_groups)
        expert_ids_NK = choice_NE.topk(self.top_k, dim=-1).indices
        gates_NK = scores_NE.gather(1, expert_ids_NK)
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20) * self.spec.routed_scaling_factor
        weight = self.spec.balance_loss_weight
        loss = weight * balance_loss(scores_NE, expert_ids_NK) if self.spec.router == "softmax" and weight else None
        return Routing(expert_ids_NK, gates_NK, loss)


def best_groups_only(choice_NE: Tensor, num_groups: int, top_k_groups: int) -> Tensor:
    """The scores with those of all but a token's best groups at -inf; a group is as good as its two best experts."""
    num_tokens, num_experts = choice_NE.shape
    choice_NGe = choice_NE.view(num_tokens, num_groups, num_experts // num_groups)
    goodness_NG = choice_NGe.topk(min(2, choice_NGe.shape[-1]), dim=-1).values.sum(-1)
    best_NG = torch.zeros_like(goodness_NG).scatter_(1, goodness_NG.topk(top_k_groups, dim=-1).indices, 1.0)
    return choice_NGe.masked_fill((best_NG == 0)[..., None], float("-inf")).view(num_tokens, num_experts)


def balance_loss(scores_NE: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """N E sum_e f_e P_e: f is the share of choices that went to an expert, P its mean score (arXiv:2101.03961, eq. 4,
    times the number of tokens). Smallest, N, where both are uniform; 0 without tokens."""
    num_experts = scores_NE.shape[1]
    counts_E = torch.bincount(expert_ids_NK.reshape(-1), minlength=num_experts).to(scores_NE.dtype)
    share_E = counts_E / max(expert_ids_NK.numel(), 1)
    return num_experts * (share_E * scores_NE.sum(0)).sum()


def corrected_bias(bias_LE: Tensor, counts_LE: Tensor, speed: float) -> Tensor:
    """The bias for the next step: down for experts with more than the mean load, up for those with less.

    Args:
        bias_LE: correction bias per MoE layer and expert.
        counts_LE: tokens routed to each expert over the whole global batch.
        speed: the size of a move (DeepSeek-V3 uses 1e-3).
    """
    counts_LE = counts_LE.to(torch.float64)
    return bias_LE + speed * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE).to(bias_LE.dtype)


def max_violation(counts_LE: Tensor) -> float:
    """MaxVio (arXiv:2408.15664, section 2.1): the largest over layers of max load / mean load - 1."""
    counts_LE = counts_LE.to(torch.float64)
    if not counts_LE.any():  # no experts, or nothing routed
        return 0.0
    return float((counts_LE.amax(-1) / counts_LE.mean(-1) - 1.0).max())
