"""The router: sigmoid scores, top-k by score plus a correction bias, gates normalised over the chosen.

Balance without an auxiliary loss, as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2): the bias takes part in the
selection only, and moves by a fixed speed against each expert's load, which is counted over the whole global batch.

Shape legend: N = tokens, D = hidden size, E = experts, K = experts per token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Args:
        expert_ids_NK: chosen experts, global ids.
        gates_NK: weights of their outputs; sum to the scaling factor per token.
    """

    expert_ids_NK: Tensor
    gates_NK: Tensor


class Router(nn.Module):
    """Scores every expert for every token in fp32, whatever the precision of the model.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        scaling_factor: what a token's gates sum to.
    """

    correction_bias_E: Tensor

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, scaling_factor: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("correction_bias_E", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> Routing:
        scores_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        expert_ids_NK = (scores_NE.detach() + self.correction_bias_E).topk(self.top_k, dim=-1).indices
        gates_NK = scores_NE.gather(1, expert_ids_NK)
        gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20) * self.scaling_factor
        return Routing(expert_ids_NK, gates_NK)


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
