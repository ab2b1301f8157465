"""Linear products of a module's matrices, as training changes them: in float8, with adapters beside them, or of rounded
operands."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.elastic.state_spec import stacked_in
from orchestrator.model.linear.low_rank import LowRankAdapter
from orchestrator.model.linear.structure import Structure
from orchestrator.spec.pretrained.lora import LoraSpec


class LinearProducts(nn.Module):
    """A module with matrices as parameters, whose products with its inputs may be changed.

    Attributes:
        linear: computes a product, as `torch.nn.functional.linear`.
        adapters: low-rank adapters, by the name of the matrix.
        quantized: what computes the products of matrices that are quantized, by their names, as `linear`, with
            the adapter as a fourth argument.
    """

    linear: Callable[..., Tensor] = staticmethod(F.linear)

    def __init__(self) -> None:
        super().__init__()
        self.adapters: Mapping[str, LowRankAdapter] = {}
        self.quantized: Mapping[str, Callable[..., Tensor]] = {}

    def product(self, x_XK: Tensor, name: str, bias_N: Tensor | None = None) -> Tensor:
        """The product of inputs (X, K) with the module's matrix of this name (N, K), and its adapter's: (X, N)."""
        weight_NK, adapter = getattr(self, name), self.adapters.get(name)
        if (quantized := self.quantized.get(name)) is not None:
            return quantized(x_XK, weight_NK, bias_N, adapter)
        y_XN = self.linear(x_XK, weight_NK, bias_N)
        return y_XN if adapter is None else y_XN + adapter(x_XK)

    def structures(self) -> tuple[Structure, ...]:
        """Units that can be left out of the module."""
        return ()

    def add_adapters(self, lora: LoraSpec) -> None:
        """Put adapters beside those of the module's matrices that are to have one."""
        found: dict[str, LowRankAdapter] = {}
        for name, param in self.named_parameters(recurse=False):
            if name in lora.matrices:
                num_outputs, num_inputs = param.shape
                blocks = stacked_in(name)
                found[name] = LowRankAdapter(num_inputs, num_outputs, lora.r, lora.scale, lora.lora_dropout, blocks)
        if found:
            self.lora = nn.ModuleDict(found)
            self.adapters = found
