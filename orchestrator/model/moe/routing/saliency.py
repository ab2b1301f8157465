"""What each expert adds to its tokens, on average over the newest steps: by this a shrink may choose those that stay.

Router-weighted expert activation pruning (REAP, arXiv:2510.13999) ranks the experts of a layer by the mean of
gate * ||expert(x)|| over the tokens that visit them. Norms are summed over the global batch in integers
(`NORM_UNIT`), so the averages have the same bits in every world.

Shape legend: E = experts, L = MoE layers.
"""

import torch
from torch import Tensor

from orchestrator.model.moe.routing.balance import RoutingCounts

NORM_UNIT = 2.0**-24
KEPT = 0.98  # of the averages, per step: their mean age is 50 steps


def next_saliency(saliency_LE2: Tensor, routed: RoutingCounts) -> Tensor:
    """The averages after a step.

    Args:
        saliency_LE2: sums of the norms of each expert's outputs, and of its tokens, weighted by age.
        routed: counts of the whole global batch.
    """
    now_LE2 = torch.stack([routed.norms_LE.double() * NORM_UNIT, routed.counts_LE.double()], dim=-1)
    return KEPT * saliency_LE2 + now_LE2.to(saliency_LE2.dtype)
