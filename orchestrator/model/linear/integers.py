"""Symmetric integers with a scale, as values of weights and of their inputs.

A scale is the largest absolute value over half the range, amax / 127.5 for 8 bits and amax / 7.5 for 4, so that the
range is used whole; a value is rounded to nearest, ties to even, and limited to the range. compressed-tensors
(`calculate_qparams`) and torchao (`MappingType.SYMMETRIC`) compute the same. Scales of groups are rounded to bf16, as
torch's kernels take them.

Shape legend: X = any leading dimensions, N = rows of a matrix, K = its columns, G = groups of columns, Q = columns of a
group.
"""

import math

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny  # of scales, so that zeros have one


def quantized(values_XK: Tensor, num_bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Integers and their scales.

    Args:
        group_size: Q, which divides K: neighbours that share a scale. None: K.

    Returns:
        integers (X, K) int8; scales (X, G) fp32.
    """
    integers_XGQ, scales_XG1 = _rounded(values_XK, num_bits, group_size)
    return integers_XGQ.reshape(values_XK.shape).to(torch.int8), scales_XG1.squeeze(-1)


def dequantized(integers_XK: Tensor, scales_XG: Tensor) -> Tensor:
    """The values that integers stand for, in fp32."""
    grouped_XGQ = integers_XK.reshape(*scales_XG.shape, -1)
    return (grouped_XGQ * scales_XG.unsqueeze(-1)).reshape(integers_XK.shape)


def rounded(values_XK: Tensor, num_bits: int, group_size: int | None = None) -> Tensor:
    """The values that are left after quantization, in the same precision."""
    integers_XGQ, scales_XG1 = _rounded(values_XK, num_bits, group_size)
    return integers_XGQ.mul_(scales_XG1).reshape(values_XK.shape).to(values_XK.dtype)


def _rounded(values_XK: Tensor, num_bits: int, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Integers (X, G, Q) as fp32, and scales (X, G, 1)."""
    half = 2 ** (num_bits - 1)
    wide = values_XK.shape[-1]
    size = group_size or wide
    values_XGQ = values_XK.float().reshape(*values_XK.shape[:-1], wide // size, size)
    amax_XG1: Tensor = torch.linalg.vector_norm(values_XGQ, math.inf, -1, keepdim=True)
    scales_XG1 = amax_XG1.div_(half - 0.5).clamp_min_(SMALLEST)
    if group_size is not None:
        scales_XG1 = scales_XG1.bfloat16().float()
    return (values_XGQ / scales_XG1).round_().clamp_(-half, half - 1), scales_XG1
