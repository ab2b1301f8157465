"""Symmetric integers with a scale, as values of weights and of their inputs.

A scale is the largest absolute value over half the range, amax / 127.5 for 8 bits and amax / 7.5 for 4, so that the
range is used whole; a value is rounded to nearest, ties to even, and limited to the range. compressed-tensors
(`calculate_qparams`) and torchao (`MappingType.SYMMETRIC`) compute the same. Scales of groups are rounded to bf16, as
torch's kernels take them.

Shape legend: X = any leading dimensions, N = rows of a matrix, K = its columns, G = groups of columns, Q = columns of a
group.
"""

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
    if group_size is None:  # a product of a model calls it for its inputs: with few operations
        integers_XK, scales_X1 = _rounded(values_XK, num_bits)
        return integers_XK.to(torch.int8), scales_X1
    integers_XGQ, scales_XG1 = _rounded(_grouped(values_XK, group_size), num_bits, in_bf16=True)
    return integers_XGQ.to(torch.int8).flatten(-2), scales_XG1.squeeze(-1)


def dequantized(integers_XK: Tensor, scales_XG: Tensor) -> Tensor:
    """The values that integers stand for, in fp32."""
    grouped_XGQ = integers_XK.reshape(*scales_XG.shape, -1)
    return (grouped_XGQ * scales_XG.unsqueeze(-1)).reshape(integers_XK.shape)


def rounded(values_XK: Tensor, num_bits: int, group_size: int | None = None) -> Tensor:
    """The values that are left after quantization, in the same precision."""
    if group_size is None:
        integers_XK, scales_X1 = _rounded(values_XK, num_bits)
        return integers_XK.mul_(scales_X1).to(values_XK.dtype)
    integers_XGQ, scales_XG1 = _rounded(_grouped(values_XK, group_size), num_bits, in_bf16=True)
    return integers_XGQ.mul_(scales_XG1).flatten(-2).to(values_XK.dtype)


def _grouped(values_XK: Tensor, group_size: int) -> Tensor:
    """The values (X, G, Q)."""
    shape = values_XK.shape
    return values_XK.reshape(*shape[:-1], shape[-1] // group_size, group_size)


def _rounded(values_XQ: Tensor, num_bits: int, in_bf16: bool = False) -> tuple[Tensor, Tensor]:
    """Integers (X, Q) as fp32, and scales (X, 1), of which each is of a row."""
    half = 2 ** (num_bits - 1)
    values_XQ = values_XQ.float()
    amax_X1 = values_XQ.abs().amax(-1, keepdim=True)  # on a CPU several times as fast as the norm, or as `aminmax`
    scales_X1 = amax_X1.div_(half - 0.5).clamp_min_(SMALLEST)
    if in_bf16:
        scales_X1 = scales_X1.bfloat16().float()
    return (values_XQ / scales_X1).round_().clamp_(-half, half - 1), scales_X1
