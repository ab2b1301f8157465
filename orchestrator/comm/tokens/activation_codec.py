"""Codecs for rows of activations sent to another rank and back.

Shape legend: N = rows, D = elements of a row, P = bytes of an encoded row.
"""

from typing import Literal

import torch
from torch import Tensor

Wire = Literal["native", "bf16", "int8"]
SCALE_BYTES = 4


def encode(x_ND: Tensor, wire: Wire, whole: int = 0) -> Tensor:
    """Rows as sent: unchanged, or as bytes (N, P), in bf16 or in int8 with a scale for each row.

    Args:
        whole: number of elements at the end of each row that are always sent unchanged.
    """
    if _is_whole(wire, x_ND.dtype):
        return x_ND.contiguous()
    x_ND, whole_NL = torch.split(x_ND, [x_ND.shape[1] - whole, whole], dim=1)
    if wire == "bf16":
        parts = [x_ND.to(torch.bfloat16)]
    else:
        scale_N1 = x_ND.abs().amax(-1, keepdim=True).float().div_(127.0)
        scaled_ND = (x_ND / torch.where(scale_N1 == 0, 1.0, scale_N1)).round_().nan_to_num_()  # the scale keeps NaN
        parts = [scaled_ND.to(torch.int8), scale_N1]
    if whole:
        parts.append(whole_NL)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def decode(rows: Tensor, wire: Wire, dtype: torch.dtype, whole: int = 0) -> Tensor:
    """Rows decoded from `encode`, up to its rounding, in `dtype`, their original one."""
    if _is_whole(wire, dtype):
        return rows
    size = whole * dtype.itemsize
    rows, whole_bytes = torch.split(rows, [rows.shape[1] - size, size], dim=1)
    if wire == "bf16":
        x_ND = _read(rows, torch.bfloat16).to(dtype)
    else:
        x_ND = _read(rows[:, :-SCALE_BYTES], torch.int8).float().mul_(_read(rows[:, -SCALE_BYTES:], torch.float32))
    return torch.cat([x_ND.to(dtype), _read(whole_bytes, dtype)], dim=1) if whole else x_ND.to(dtype)


def _read(rows: Tensor, dtype: torch.dtype) -> Tensor:
    # `contiguous` would leave a single row, or none, at an offset or a stride that `dtype` can't be read from.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def _is_whole(wire: Wire, dtype: torch.dtype) -> bool:
    """Whether the encoding would be lossless, so rows are sent unchanged."""
    return wire == "native" or (wire == "bf16" and dtype == torch.bfloat16)
