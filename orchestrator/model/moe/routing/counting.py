"""Counting without a wait of the host for the device."""

import torch
from torch import Tensor


def count(values_N: Tensor, size: int) -> Tensor:
    """How often each of 0 .. size - 1 occurs, (size) int64. Values are int64, and smaller than `size`.

    On a GPU `torch.bincount` has the host wait, to look for larger values.
    """
    if values_N.is_cpu:
        return torch.bincount(values_N, minlength=size)
    return torch.zeros(size, dtype=torch.int64, device=values_N.device).scatter_add_(
        0, values_N, torch.ones_like(values_N)
    )


def count_experts(expert_ids: Tensor, num_experts: int, has_gaps: bool) -> Tensor:
    """How often each expert was chosen, (num_experts) int64. With gaps, `num_experts` stands for none."""
    counts = count(expert_ids.reshape(-1), num_experts + has_gaps)
    return counts[:num_experts] if has_gaps else counts
