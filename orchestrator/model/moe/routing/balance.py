"""Routers' state that follows their choices, step by step: correction biases, and thresholds of `top_p`.

Load balancing without an auxiliary loss: the next step's correction bias follows from a step's choices.

A router chooses the top K of score + bias (`orchestrator.model.moe.routing.router`). Two rules change the bias after
updates:

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

The threshold of `top_p` follows a quantile too. A choice is made if the shares of the better ones lie below the
threshold; a histogram of their excess over it gives the threshold by which the mean number of choices is K.

Shape legend: N = tokens, E = experts, K = experts per token, L = MoE layers, M = bins of a histogram.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from orchestrator.model.moe.routing.counting import count
from orchestrator.policy.health.expert_load import MARGIN_EDGES, NUM_MARGIN_BINS
from orchestrator.spec.model import BIAS_UPDATE_SPEED, ModelSpec


@dataclass(frozen=True)
class RoutingCounts:
    """Integer counts of routers over some tokens, int64: sums don't depend on how the tokens are divided.

    Args:
        counts_LE: tokens that chose each expert.
        margins_LEM: histograms of all tokens by their margin at each expert; M is 0 where no rule needs them.
        masses_LM: histograms of shares of scores by their excess over the threshold; M is 0 but with `top_p`.
        dropped_L: choices that a capacity dropped.
        norms_LE: sums of the norms of each expert's weighted outputs (`orchestrator.model.moe.routing.saliency`);
            (L, 0) where they aren't kept.
    """

    counts_LE: Tensor
    margins_LEM: Tensor
    masses_LM: Tensor
    dropped_L: Tensor
    norms_LE: Tensor

    @classmethod
    def zeros(
        cls, num_layers: int, spec: ModelSpec, device: torch.device | None = None, with_norms: bool = False
    ) -> "RoutingCounts":
        """Zero counts."""
        counts_LE = torch.zeros(num_layers, spec.n_routed_experts, dtype=torch.int64, device=device)
        num_bins = NUM_MARGIN_BINS if spec.counts_margins else 0
        masses_LM = counts_LE.new_zeros(num_layers, NUM_MARGIN_BINS if spec.router.selection == "top_p" else 0)
        return cls(
            counts_LE,
            counts_LE.new_zeros(*counts_LE.shape, num_bins),
            masses_LM,
            counts_LE.new_zeros(num_layers),
            counts_LE.new_zeros(num_layers, spec.n_routed_experts if with_norms else 0),
        )

    @classmethod
    def of(cls, counts_LE: Tensor, margins_LEM: Tensor | None = None) -> "RoutingCounts":
        """Counts of choices without thresholds and capacities. Without margins, if none are given."""
        num_layers, num_experts = counts_LE.shape
        if margins_LEM is None:
            margins_LEM = counts_LE.new_zeros(num_layers, num_experts, 0)
        none_L0 = counts_LE.new_zeros(num_layers, 0)
        return cls(counts_LE, margins_LEM, none_L0, counts_LE.new_zeros(num_layers), none_L0)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All counts."""
        return self.counts_LE, self.margins_LEM, self.masses_LM, self.dropped_L, self.norms_LE

    def add(self, other: "RoutingCounts") -> None:
        """Add the counts of other tokens, from any device."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.add_(theirs.to(mine.device))

    def flat(self) -> Tensor:
        """All counts in one dimension."""
        return torch.cat([part.reshape(-1) for part in self.parts])

    def from_flat(self, flat: Tensor) -> "RoutingCounts":
        """Counts of these shapes, from what their `flat` returned."""
        pieces = torch.split(flat, [part.numel() for part in self.parts])
        return RoutingCounts(*(piece.view(part.shape) for piece, part in zip(pieces, self.parts, strict=True)))


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


def next_mass(offset_L1: Tensor, routed: RoutingCounts, spec: ModelSpec, decay: float) -> Tensor:
    """Offsets of the thresholds of `top_p` for the next step.

    Args:
        offset_L1: of each MoE layer, which the step's routing used.
        routed: counts of the whole global batch, on the offsets' device.
        decay: as of `next_bias`; the share of the way falls alike.
    """
    counted_L = routed.masses_LM.sum(-1).double()
    tokens_L = counted_L / (spec.max_experts_per_tok - 1)
    # A token's first choice needs no room below the threshold.
    above_L = counted_L - tokens_L * (spec.num_experts_per_tok - 1)
    moves_L = BIAS_UPDATE_SPEED["quantile"] * max(decay, 0.1) * _exceeded_by(routed.masses_LM, above_L)
    return offset_L1 + torch.where(counted_L > 0, moves_L, 0.0).to(offset_L1.dtype)[:, None]


def margins(choice_NE: Tensor, last_in_N1: Tensor, first_out_N1: Tensor) -> Tensor:
    """Margin of each token at each expert (N, E): above 0 only where the token chooses the expert.

    Args:
        choice_NE: score + bias.
        last_in_N1: the least of those that a token chooses.
        first_out_N1: the largest of the others that it may choose; -inf where there is none.
    """
    return choice_NE - torch.where(choice_NE >= last_in_N1, first_out_N1, last_in_N1)


def margin_histogram(margin_NE: Tensor) -> Tensor:
    """Histogram (E, M) of tokens by their margin at each expert, int64."""
    num_experts = margin_NE.shape[1]
    bin_NE = torch.bucketize(margin_NE, _edges(margin_NE.dtype, margin_NE.device))
    bin_NE += torch.arange(num_experts, device=bin_NE.device) * NUM_MARGIN_BINS
    return count(bin_NE.reshape(-1), num_experts * NUM_MARGIN_BINS).view(num_experts, NUM_MARGIN_BINS)


def excess_histogram(excess_Nk: Tensor) -> Tensor:
    """Histogram (M) of values by their excess, int64."""
    bin_R = torch.bucketize(excess_Nk.reshape(-1), _edges(excess_Nk.dtype, excess_Nk.device))
    return count(bin_R, NUM_MARGIN_BINS)


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
    quantile_LE = _exceeded_by(margins_LEM, tokens_L1.double() * top_k / num_experts)
    moves_LE = -speed * (quantile_LE - quantile_LE.mean(-1, keepdim=True))
    return bias_LE + torch.where(tokens_L1 > 0, moves_LE, 0.0).to(bias_LE.dtype)


def _exceeded_by(histogram_XM: Tensor, wanted_X: Tensor) -> Tensor:
    """The value that `wanted_X` of a histogram's values exceed, interpolated within its bin; X = any dimensions."""
    # By bin, in descending order: values above the bin's lower edge.
    above_XM = histogram_XM.flip(-1).cumsum(-1).double()
    place_X1 = (above_XM < wanted_X[..., None]).sum(-1, keepdim=True).clamp(max=NUM_MARGIN_BINS - 1)
    within_X = histogram_XM.flip(-1).gather(-1, place_X1).squeeze(-1).double()
    before_X = above_XM.gather(-1, place_X1).squeeze(-1) - within_X
    # Bin 0 lies above the highest edge, the last bin below the lowest; both are represented by that edge.
    edges = torch.tensor(MARGIN_EDGES, dtype=torch.float64, device=histogram_XM.device).flip(0)
    upper = torch.cat([edges[:1], edges])
    lower = torch.cat([edges, edges[-1:]])
    part_X = (wanted_X - before_X) / within_X.clamp(min=1.0)
    place_X = place_X1.squeeze(-1)
    return upper[place_X] + part_X * (lower - upper)[place_X]


def sign_bias(bias_LE: Tensor, counts_LE: Tensor, speed: float) -> Tensor:
    """The bias for the next step, by the sign rule.

    Args:
        bias_LE: correction bias per MoE layer and expert.
        counts_LE: tokens routed to each expert over the whole global batch.
        speed: the size of a move (DeepSeek-V3 uses 1e-3).
    """
    counts_LE = counts_LE.to(torch.float64)
    return bias_LE + speed * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE).to(bias_LE.dtype)
