"""Rows of activations in fewer bytes, for their way to another rank and back.

Shape legend: N = rows, D = their elements, P = bytes of a row on its way.
"""

from typing import Literal

import torch
from torch import Tensor

Wire = Literal["exact", "bf16", "int8"]
SCALE_BYTES = 4


def encode(x_ND: Tensor, wire: Wire) -> Tensor:
    """Rows as they travel: as they are, in bf16, or in int8 with a scale for each row (N, P)."""
    if wire == "int8":
        scale_N1 = x_ND.abs().amax(-1, keepdim=True).float().div_(127.0)
        scaled_ND = (x_ND / torch.where(scale_N1 == 0, 1.0, scale_N1)).round_().nan_to_num_()  # the scale tells of NaN
        return torch.cat([scaled_ND.to(torch.int8).view(torch.uint8), scale_N1.view(torch.uint8)], dim=1)
    return x_ND.to(torch.bfloat16) if wire == "bf16" else x_ND.contiguous()


def decode(rows: Tensor, wire: Wire, dtype: torch.dtype) -> Tensor:
    """What `encode` was given, as near as it comes, in `dtype`."""
    if wire == "int8":
        scale_N1 = rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)
        return rows[:, :-SCALE_BYTES].view(torch.int8).to(torch.float32).mul_(scale_N1).to(dtype)
    return rows.to(dtype)
