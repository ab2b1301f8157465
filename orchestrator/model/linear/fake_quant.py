"""Products of values that are rounded as integers will round them: y = fq(x) fq(W)ᵀ, for quantization-aware training.

Gradients pass the rounding unchanged (the straight-through estimator, Bengio et al., arXiv:1308.3432; Jacob et al.,
arXiv:1712.05877): dx = dy fq(W), dW = dyᵀ fq(x). An adapter of the matrix is merged before it is rounded, as it is when
the model is exported: fq(W + s B A).

Each token's inputs have a scale of their own, so results don't depend on the tokens beside it, and no rank's on another
rank's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.linear.integers import rounded
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

    def __call__(self, x_XK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """`torch.nn.functional.linear` of rounded operands."""
        x_XK = x_XK if self.input_bits is None else _Rounded.apply(x_XK, self.input_bits, None)  # type: ignore[no-untyped-call]
        weight_NK = _Rounded.apply(weight_NK, self.num_bits, self.group_size)  # type: ignore[no-untyped-call]
        return F.linear(x_XK, weight_NK.to(x_XK.dtype), bias_N)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_XK: Tensor, num_bits: int, group_size: int | None) -> Tensor:
        return rounded(values_XK, num_bits, group_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def use_fake_quantization(model: nn.Module, spec: QuantizationSpec) -> None:
    """Round the operands of the model's matrices that the section names."""
    input_bits = None if spec.activation_dtype is None else NUM_BITS[spec.activation_dtype]
    quantizer = FakeQuantizer(spec.num_bits, spec.group_size, input_bits)
    for prefix, module in model.named_modules():
        if isinstance(module, LinearProducts):
            for name, param in module.named_parameters(recurse=False):
                if spec.has(f"{prefix}.{name}", param.shape):
                    module.quantized = {**module.quantized, name: quantizer}
