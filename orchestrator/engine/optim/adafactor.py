"""Adafactor (arXiv:1804.04235), as torch's: the second moment of a matrix as a column times a row.

What is kept of a matrix of R rows and C columns are R + C numbers, of a tensor with more dimensions that of its last
two, and of a vector one number per weight. No momentum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.elastic.state_spec import FACTORS
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.spec.optimizer import OptimizerSpec

DECAY = -0.8  # of the share of a new square in the averages, as a power of the update's number
TINY = torch.finfo(torch.float32).eps
LEAST_RMS = 1e-3  # of weights, by which an update is scaled
LARGEST_RMS = 1.0  # of an update before that


class Adafactor:
    """r += s (mean of g^2 over columns - r), c += s (mean over rows - c) with s = t^-0.8; u = g / sqrt(r c / mean(r));
    w -= min(lr, 1 / sqrt(t)) max(1e-3, rms(w)) u / max(1, rms(u)). So `lr` is relative to the weights: torch takes them
    from before their decay, this from after it."""

    def __init__(self, spec: OptimizerSpec) -> None:
        pass

    def update(self, master: Tensor, grad: Tensor, state: Mapping[str, Tensor], at: UpdateInfo) -> None:
        share, square = float(at.number) ** DECAY, grad * grad
        is_factored = grad.dim() > 1
        new = torch.cat([square.mean(-1), square.mean(-2)], -1) if is_factored else square
        kept = state[FACTORS].view(new.shape).mul_(1.0 - share).add_(new.mul_(share))
        moment = _product(kept, grad.shape[-2]) if is_factored else kept
        update = grad / moment.clamp(min=TINY * TINY).sqrt_()
        scale = _rms(master).clamp_(min=LEAST_RMS) * min(at.lr, at.number**-0.5)
        master.sub_(update.mul_(scale / _rms(update).div_(LARGEST_RMS).clamp_(min=1.0)))


def _product(factors: Tensor, num_rows: int) -> Tensor:
    """[..., R, C], the second moment, from means by row and by column, [..., R + C]."""
    row, column = factors[..., :num_rows].clone(), factors[..., num_rows:].clone()
    return (row / row.mean(-1, keepdim=True).clamp_(min=TINY)).unsqueeze(-1) * column.unsqueeze(-2)


def _rms(values: Tensor) -> Tensor:
    """Root mean square. The square is in memory of its own: sums may have other bits at another alignment."""
    square = values * values
    return square.flatten(1).mean(1).mean().sqrt_() if values.dim() > 1 else square.mean().sqrt_()
