"""Matrices of integers, and their products with inputs: the inference path of quantized models.

With a scale per row, products are of int8 (`torch._int_mm`, on CPUs with VNNI instructions), of inputs that are
quantized with a scale per token as they come. Four-bit weights whose scales are of groups are multiplied by torch's
kernel of a CPU for them, which reads half a byte per weight, and whose outputs are in bf16. What neither takes is
multiplied in floating point.

Shape legend: X = any leading dimensions, M = rows of inputs, C = rows of a chunk, N = rows of a matrix, K = its
columns, G = groups of columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.model.linear.integers import dequantized, quantized, rounded

KERNEL_GROUPS = (32, 64, 128, 256)  # of torch's four-bit kernel
KERNEL_ROWS = 16  # of which N is a multiple there
CHUNK = {"cpu": 256}  # rows of inputs at once, whose sums suit a CPU's caches
GPU_ROWS = 32  # at least so many rows of inputs does torch._int_mm take on a GPU, and multiples of 8
ALIGNED = 8


class IntMatrix(nn.Module):
    """Takes the place of `torch.nn.functional.linear` with one matrix.

    Args:
        weight_NK: the values that are quantized.
        num_bits: of a weight, 8 or 4.
        group_size: weights of a row that share a scale; None: all.
        input_bits: of inputs, 8; None: they aren't rounded.
    """

    def __init__(self, weight_NK: Tensor, num_bits: int, group_size: int | None, input_bits: int | None) -> None:
        super().__init__()
        self._num_rows, num_columns = weight_NK.shape
        self._group_size, self._input_bits = group_size, input_bits
        on_cpu = weight_NK.device.type == "cpu"
        self._is_grouped_int4 = (
            on_cpu and num_bits == 4 and group_size in KERNEL_GROUPS and self._num_rows % KERNEL_ROWS == 0
        )
        is_aligned = on_cpu or self._num_rows % ALIGNED == num_columns % ALIGNED == 0
        self._is_int8 = group_size is None and input_bits == 8 and is_aligned
        integers_NK, scales_NG = quantized(weight_NK, num_bits, group_size)
        if self._is_grouped_int4:
            integers_NK = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers_NK.int() + 8, 1)
            scales_GN = scales_NG.t().bfloat16()
            scales_NG = torch.stack((scales_GN, torch.zeros_like(scales_GN)), -1)  # the others are zero points
        self.register_buffer("integers", integers_NK, persistent=False)
        self.register_buffer("scales", scales_NG, persistent=False)
        self.integers: Tensor
        self.scales: Tensor

    def forward(
        self, x_XK: Tensor, weight_NK: None = None, bias_N: Tensor | None = None, adapter: None = None
    ) -> Tensor:
        """The product (X, N). The matrix, with its adapter, is that of the constructor."""
        x_MK = x_XK.reshape(-1, x_XK.shape[-1])
        if self._is_int8:
            y_MN = self._by_int8(x_MK)
        elif self._is_grouped_int4:
            y_MN = self._by_grouped_int4(x_MK)
        else:
            x_MK = x_MK if self._input_bits is None else rounded(x_MK, self._input_bits)
            y_MN = F.linear(x_MK.float(), dequantized(self.integers, self.scales))
        y_MN = y_MN if bias_N is None else y_MN + bias_N
        return y_MN.to(x_XK.dtype).view(*x_XK.shape[:-1], self._num_rows)

    def _by_int8(self, x_MK: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # loops over sums are fused there; and one over chunks is code per count
            return self._of_chunk(x_MK)
        count = len(x_MK)
        chunk = CHUNK.get(x_MK.device.type, max(count, 1))
        if 0 < count <= chunk:
            return self._of_chunk(x_MK)
        y_MN = x_MK.new_empty(count, self._num_rows, dtype=torch.float32)
        for start in range(0, count, chunk):
            self._of_chunk(x_MK[start : start + chunk], y_MN[start : start + chunk])
        return y_MN

    def _of_chunk(self, x_CK: Tensor, out_CN: Tensor | None = None) -> Tensor:
        integers_CK, scales_C1 = quantized(x_CK, 8)
        count = len(x_CK)
        if integers_CK.is_cuda:
            integers_CK = F.pad(integers_CK, (0, 0, 0, max(-count % ALIGNED, GPU_ROWS - count)))
        sums_CN = torch._int_mm(integers_CK, self.integers.t())[:count]
        y_CN = sums_CN.float() if out_CN is None else out_CN.copy_(sums_CN)  # a product of both types takes longer
        return y_CN.mul_(scales_C1).mul_(self.scales.t())

    def _by_grouped_int4(self, x_MK: Tensor) -> Tensor:
        factors_M1 = None
        if self._input_bits is not None:  # integers are exact in bf16
            x_MK, factors_M1 = quantized(x_MK, self._input_bits)
        y_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK.bfloat16().contiguous(), self.integers, self._group_size, self.scales
        ).float()
        found_MN: Tensor = y_MN if factors_M1 is None else y_MN.mul_(factors_M1)
        return found_MN


class IntEmbedding(nn.Module):
    """Takes the place of `torch.nn.Embedding`, with int8 values and a scale per row.

    Args:
        weight_VD: the values that are quantized.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        integers_VD, scales_V1 = quantized(weight_VD, 8)
        self.register_buffer("integers", integers_VD, persistent=False)
        self.register_buffer("scales", scales_V1, persistent=False)
        self.integers: Tensor
        self.scales: Tensor

    def forward(self, ids_X: Tensor) -> Tensor:
        """Values (X, D), fp32."""
        return self.integers[ids_X] * self.scales[ids_X]
