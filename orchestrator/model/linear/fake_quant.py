"""Products of values that are rounded as integers will round them: y = fq(x) fq(W)ᵀ, for quantization-aware training.

Gradients pass the rounding unchanged (the straight-through estimator, Bengio et al., arXiv:1308.3432; Jacob et al.,
arXiv:1712.05877): dx = dy fq(W), dW = dyᵀ fq(x). An adapter of the matrix is merged before it is rounded, as it is when
the model is exported: fq(W + s B A).

Each token's inputs have a scale of their own, so results don't depend on the tokens beside it, and no rank's on another
rank's.

Shape legend: X = any leading dimensions, M = rows of inputs, K = inputs, N = outputs, R = rank of an adapter, S = rank
times stacked matrices.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.model.linear.integers import rounded
from orchestrator.model.linear.low_rank import LowRankAdapter, merged, weight_gradients
from orchestrator.model.linear.products import LinearProducts
from orchestrator.spec.quantization import NUM_BITS, QuantizationSpec


@dataclass(frozen=True)
class FakeQuantizer:
    """How the operands of a matrix's products are rounded.

    Args:
        num_bits: of weights.
        group_size: weights of a row that share a scale; None: all.
        input_bits: None: inputs aren't rounded.
    """

    num_bits: int
    group_size: int | None
    input_bits: int | None

    def rounded_weight(self, weight_NK: Tensor) -> Tensor:
        """The matrix, rounded. Without gradients."""
        return rounded(weight_NK, self.num_bits, self.group_size)

    def rounded_inputs(self, x_XK: Tensor) -> Tensor:
        """Inputs, rounded. Without gradients."""
        return x_XK if self.input_bits is None else rounded(x_XK, self.input_bits)

    def __call__(
        self, x_XK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, adapter: LowRankAdapter | None = None
    ) -> Tensor:
        """`torch.nn.functional.linear` of rounded operands, of the matrix with its adapter."""
        x_MK = x_XK.reshape(-1, x_XK.shape[-1])
        beside = (0.0, None, None) if adapter is None else (adapter.scale, adapter.A, adapter.B)
        y_MN: Tensor = _Product.apply(x_MK, weight_NK, self, *beside)  # type: ignore[no-untyped-call]
        y_XN = y_MN.view(*x_XK.shape[:-1], len(weight_NK))
        return y_XN if bias_N is None else y_XN + bias_N


class _Product(torch.autograd.Function):
    """Keeps its operands for the backward pass, which merges and rounds them again, not copies."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        weight_NK: Tensor,
        quantizer: FakeQuantizer,
        scale: float,
        A_SK: Tensor | None,
        B_NR: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK, A_SK, B_NR)
        ctx.quantizer, ctx.scale = quantizer, scale
        whole_NK = _whole(quantizer, weight_NK, scale, A_SK, B_NR).to(x_MK.dtype)
        return torch.mm(quantizer.rounded_inputs(x_MK), whole_NK.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_MN,) = grads
        x_MK, weight_NK, A_SK, B_NR = ctx.saved_tensors
        needs_x, needs_weight, *_, needs_adapter = ctx.needs_input_grad
        dx_MK = None
        if needs_x:
            dx_MK = torch.mm(dy_MN, _whole(ctx.quantizer, weight_NK, ctx.scale, A_SK, B_NR).to(dy_MN.dtype))
        rounded_MK = ctx.quantizer.rounded_inputs(x_MK)
        dweight_NK = torch.mm(dy_MN.t(), rounded_MK).to(weight_NK.dtype) if needs_weight else None
        of_adapter = weight_gradients(dy_MN, rounded_MK, A_SK, B_NR, ctx.scale) if needs_adapter else (None, None)
        return dx_MK, dweight_NK, None, None, *of_adapter


def _whole(
    quantizer: FakeQuantizer, weight_NK: Tensor, scale: float, A_SK: Tensor | None, B_NR: Tensor | None
) -> Tensor:
    """The rounded matrix, with its adapter if it has one."""
    if A_SK is None or B_NR is None:
        return quantizer.rounded_weight(weight_NK)
    return quantizer.rounded_weight(merged(weight_NK, A_SK, B_NR, scale))


def use_fake_quantization(model: nn.Module, spec: QuantizationSpec) -> None:
    """Round the operands of the model's matrices that the section names."""
    input_bits = None if spec.activation_dtype is None else NUM_BITS[spec.activation_dtype]
    quantizer = FakeQuantizer(spec.num_bits, spec.group_size, input_bits)
    for prefix, module in model.named_modules():
        if isinstance(module, LinearProducts):
            for name, param in module.named_parameters(recurse=False):
                if spec.has(f"{prefix}.{name}", param.shape):
                    module.quantized = {**module.quantized, name: quantizer}
