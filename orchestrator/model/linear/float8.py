"""Linear products in float8, with a scale for each operand that follows its current values.

An operand is scaled so that its largest absolute value becomes that of the format, and rounded; `torch._scaled_mm`
multiplies the rounded operands, and divides by the scales. Activations and weights are in e4m3, gradients in e5m2
(Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433); scales are per tensor and dynamic, as in
torchao's float8 training with tensorwise scaling. Parameters, their gradients and the optimizer's state keep their
formats.

GPUs take sizes that are multiples of 16: operands are padded with zeros.

Shape legend: M, K, N = sizes of a product (M, K) times (K, N), P, Q = sizes of an operand.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.linear.products import LinearProducts

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNED = 16
SMALLEST = 1e-12  # of largest values: the scale of zeros is finite


def use_float8(model: nn.Module) -> None:
    """Compute the linear products of the model's attention, MLPs and experts in float8."""
    for module in model.modules():
        if isinstance(module, LinearProducts):
            module.linear = linear


def linear(x_XK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by products in float8, forward and backward."""
    y_MN: Tensor = _Linear.apply(x_XK.reshape(-1, x_XK.shape[-1]), weight_NK)  # type: ignore[no-untyped-call]
    y_XN = y_MN.view(*x_XK.shape[:-1], len(weight_NK))
    return y_XN if bias_N is None else y_XN + bias_N


def mm(left_MK: Tensor, right_KN: Tensor, *, out: Tensor | None = None, of_gradient: bool = False) -> Tensor:
    """`torch.mm` in float8. A value that isn't finite makes the whole product NaN, so that the step is skipped.

    Args:
        of_gradient: whether the left matrix is a gradient.
    """
    if not (left_MK.numel() and right_KN.numel()):
        return torch.mm(left_MK, right_KN, out=out)
    left, left_scale = _scaled(left_MK, GRADIENTS if of_gradient else VALUES)
    right, right_scale = _scaled(right_KN.t(), VALUES)
    product = torch._scaled_mm(left, right.t(), left_scale, right_scale, out_dtype=left_MK.dtype)
    product_MN = product[: len(left_MK), : right_KN.shape[1]]
    return product_MN if out is None else out.copy_(product_MN)


def _scaled(x_PQ: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scaled matrix, padded and row by row in memory, and the factor that undoes its scale (fp32)."""
    most = torch.finfo(dtype).max
    scale = most / x_PQ.abs().amax().float().clamp_min(SMALLEST)
    scaled_PQ = (x_PQ.float() * scale).clamp_(-most, most)  # beyond it the cast gives NaN
    P, Q = x_PQ.shape
    return F.pad(scaled_PQ, (0, -Q % ALIGNED, 0, -P % ALIGNED)).contiguous().to(dtype), scale.reciprocal()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        return mm(x_MK, weight_NK.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy_MN,) = grads
        x_MK, weight_NK = ctx.saved_tensors
        dx_MK = mm(dy_MN, weight_NK, of_gradient=True) if ctx.needs_input_grad[0] else None
        return dx_MK, mm(dy_MN.t(), x_MK, of_gradient=True) if ctx.needs_input_grad[1] else None
