"""Load balancing of routers without an auxiliary loss: computes the next step's correction bias from a step's choices.

A router chooses the top K of score + bias (`orchestrator.model.moe.routing.router`). Two rules change the bias after updates:

- `quantile`: an expert's bias moves by a share of the change that by itself would give the expert the mean load. A
  token's *margin* at an expert is the amount by which its score + bias exceeds the K-th best of the other experts; the
  token chooses the expert if the margin is above 0. So an expert would have n tokens if its bias moved by minus its
  n-th largest margin. Histograms of margins are summed over the global batch in integers, so the result has the same
  bits in every world. For the bias of a single expert this is one step of the auction for a balanced assignment in
  BASE layers (arXiv:2103.16716), which sorts tokens within a step; here no token of the step is displaced.
- `sign`: a fixed step up for experts with less than the mean load, down for those with more (DeepSeek-V3,
  arXiv:2412.19437, section 2.1.2).

The quantile rule is scale-free: it follows scores whatever their spread or rate of change. The sign rule moves by its
speed only, and lags behind scores that change faster (measured by `python -m benchmarks.balance`).

Shape legend: N = tokens, E = experts, K = experts per token, L = MoE layers, M = bins of a histogram of margins.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from orchestrator.model.moe.counting import count
from orchestrator.policy.health.expert_load import MARGIN_EDGES, NUM_MARGIN_BINS
from orchestrator.spec.model import BIAS_UPDATE_SPEED, ModelSpec


@dataclass(frozen=True)
class RoutingCounts:
    """Integer counts of routers over some tokens, int64: sums don't depend on how the tokens are divided.

    Args:
        counts_LE: tokens that chose each expert.
        margins_LEM: histograms of all tokens by their margin at each expert; M is 0 where no rule needs them.
    """

    counts_LE: Tensor
    margins_LEM: Tensor

    @classmethod
    def zeros(cls, num_layers: int, spec: ModelSpec, device: torch.device | None = None) -> "RoutingCounts":
        """Zero counts."""
        counts_LE = torch.zeros(num_layers, spec.n_routed_experts, dtype=torch.int64, device=device)
        num_bins = NUM_MARGIN_BINS if spec.counts_margins else 0
        return cls(counts_LE, counts_LE.new_zeros(*counts_LE.shape, num_bins))

    def add(self, other: "RoutingCounts") -> None:
        """Add the counts of other tokens, from any device."""
        self.counts_LE.add_(other.counts_LE.to(self.counts_LE.device))
        self.margins_LEM.add_(other.margins_LEM.to(self.margins_LEM.device))


def next_bias(bias_LE: Tensor, routed: RoutingCounts, spec: ModelSpec, decay: float) -> Tensor:
    """The bias for the next step, by the rule of the job. A layer whose router counts no margins (a user's own) follows
    the sign rule with its default speed.

    Args:
        bias_LE: correction bias of each MoE layer that the step's routing used.
        routed: counts of the whole global batch, on the bias's device.
        decay: the learning rate over its peak, after warm-up. The quantile rule's share falls with it, to a tenth at
            most: scores move as fast as weights do, and a smaller share follows the noise of a batch less.
    """
    speed = spec.bias_update_speed
    if spec.bias_update == "sign":
        return sign_bias(bias_LE, routed.counts_LE, speed)
    if not spec.counts_margins:
        return bias_LE
    by_quantile_LE = quantile_bias(bias_LE, routed.margins_LEM, spec.num_experts_per_tok, speed * max(decay, 0.1))
    by_sign_LE = sign_bias(bias_LE, routed.counts_LE, BIAS_UPDATE_SPEED["sign"])
    return torch.where(routed.margins_LEM.any(-1).any(-1)[:, None], by_quantile_LE, by_sign_LE)


def margins(choice_NE: Tensor, best_NK: Tensor) -> Tensor:
    """Margin of each token at each expert (N, E): above 0 only where the token chooses the expert.

    Args:
        choice_NE: score + bias.
        best_NK: the K + 1 largest among those that a token may choose, in descending order (so the last dimension is
            K + 1); the last is -inf where it may choose only K.
    """
    last_in_N1, first_out_N1 = best_NK[:, -2:-1], best_NK[:, -1:]
    return choice_NE - torch.where(choice_NE >= last_in_N1, first_out_N1, last_in_N1)


def margin_histogram(margin_NE: Tensor) -> Tensor:
    """Histogram (E, M) of tokens by their margin at each expert, int64."""
    num_experts = margin_NE.shape[1]
    bin_NE = torch.bucketize(margin_NE, _edges(margin_NE.dtype, margin_NE.device))
    bin_NE += torch.arange(num_experts, device=bin_NE.device) * NUM_MARGIN_BINS
    return count(bin_NE.reshape(-1), num_experts * NUM_MARGIN_BINS).view(num_experts, NUM_MARGIN_BINS)


@cache
def _edges(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(MARGIN_EDGES, dtype=dtype, device=device)


def quantile_bias(bias_LE: Tensor, margins_LEM: Tensor, top_k: int, speed: float) -> Tensor:
    """The bias for the next step, by the quantile rule.

    Args:
        bias_LE: correction bias of each MoE layer that the routing used.
        margins_LEM: histograms of the whole global batch.
        top_k: K.
        speed: the share of the way to the mean load that a bias moves, 0 to 1.

    Returns:
        (L, E); a layer without tokens keeps its bias. The mean of a layer's changes is 0: a constant added to all
        biases changes no choice.
    """
    num_experts = bias_LE.shape[1]
    tokens_L1 = margins_LEM[:, :1].sum(-1)
    wanted_L1 = tokens_L1.double() * top_k / num_experts
    # By bin, in descending order: tokens above the bin's lower edge.
    above_LEM = margins_LEM.flip(-1).cumsum(-1).double()
    place_LE1 = (above_LEM < wanted_L1[..., None]).sum(-1, keepdim=True).clamp(max=NUM_MARGIN_BINS - 1)
    within_LE = margins_LEM.flip(-1).gather(-1, place_LE1).squeeze(-1).double()
    before_LE = above_LEM.gather(-1, place_LE1).squeeze(-1) - within_LE
    # Bin 0 lies above the highest edge, the last bin below the lowest; both are represented by that edge.
    edges = torch.tensor(MARGIN_EDGES, dtype=torch.float64, device=bias_LE.device).flip(0)
    upper = torch.cat([edges[:1], edges])
    lower = torch.cat([edges, edges[-1:]])
    part_LE = (wanted_L1 - before_LE) / within_LE.clamp(min=1.0)
    place_LE = place_LE1.squeeze(-1)
    quantile_LE = upper[place_LE] + part_LE * (lower - upper)[place_LE]
    moves_LE = -speed * (quantile_LE - quantile_LE.mean(-1, keepdim=True))
    return bias_LE + torch.where(tokens_L1 > 0, moves_LE, 0.0).to(bias_LE.dtype)


def sign_bias(bias_LE: Tensor, counts_LE: Tensor, speed: float) -> Tensor:
    """The bias for the next step, by the sign rule.

    Args:
        bias_LE: correction bias per MoE layer and expert.
        counts_LE: tokens routed to each expert over the whole global batch.
        speed: the size of a move (DeepSeek-V3 uses 1e-3).
    """
    counts_LE = counts_LE.to(torch.float64)
    return bias_LE + speed * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE).to(bias_LE.dtype)
