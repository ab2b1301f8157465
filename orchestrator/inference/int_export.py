"""Integers in an exported directory, in the format of compressed-tensors: names, shapes, and the section of
`config.json` by which other libraries read them.

With a scale per row, int8 is stored as such (`int-quantized`); four-bit weights, and those with scales of groups, are
packed in int32 (`pack-quantized`), and so are all weights of routed experts, of which transformers reads no other form.
Embeddings and the output matrix are int8 with a scale per row.

Shape legend: N = rows of a matrix, K = its columns, W = 32-bit words of a row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestrator.errors import UsageError
from orchestrator.model.linear.integers import quantized
from orchestrator.spec.quantization import QuantizationSpec

EMBEDDING, HEAD, EXPERTS = "embedding.weight", "head", ".experts."
UNPACKED, PACKED = "int-quantized", "pack-quantized"
WORD_BITS = 32
_WEIGHT = ".weight"
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

Array = npt.NDArray[Any]


class IntFormat:
    """Implements `orchestrator.checkpoint.hf.export.Encoding`.

    Args:
        formats: of the matrices.
    """

    def __init__(self, formats: QuantizationSpec) -> None:
        self._formats = formats
        self._is_packed = formats.num_bits < 8 or formats.group_size is not None
        self._has_experts = False
        self._kept: list[str] = []

    def encoded(self, name: str, their_name: str, values: Array) -> Iterator[tuple[str, Array]]:
        """One of their tensors as it is written.

        Args:
            name: of our tensor that it is made of.
            values: fp32.

        Raises:
            UsageError: it is of an expert, and stays as it is.
        """
        module = their_name.removesuffix(_WEIGHT)
        formats = self._formats
        if name in (EMBEDDING, HEAD):
            yield from _unpacked(module, *quantized(torch.from_numpy(values), 8))
        elif formats.has(name, values.shape):
            found = quantized(torch.from_numpy(values), formats.num_bits, formats.group_size)
            is_expert = EXPERTS in name
            self._has_experts |= is_expert
            is_packed = self._is_packed or is_expert
            yield from _packed(module, *found, formats.num_bits) if is_packed else _unpacked(module, *found)
        elif EXPERTS in name:
            raise UsageError(
                f"train.quantization.params leaves {name} as it is, and transformers drops experts that aren't "
                "quantized from a directory with integers",
                remedy="Export it in fp32 or bf16, or train with params that have all matrices of experts.",
                unchanged="Nothing was written.",
            )
        else:
            if values.ndim == 2:
                self._kept.append(module)
            yield their_name, values

    def section(self) -> dict[str, Any]:
        """`quantization_config`, once all tensors are encoded."""
        formats = self._formats
        scales = {"strategy": "channel"} if formats.group_size is None else _group(formats.group_size)
        inputs = None if formats.activation_dtype is None else _TOKEN
        form = PACKED if self._is_packed else UNPACKED
        of_all = {"weights": _weights(formats.num_bits, scales), "input_activations": inputs}
        of_rows = {"weights": _weights(8, {"strategy": "channel"}), "format": UNPACKED}
        groups = [
            {"targets": ["Linear"], **of_all, "format": form},
            {"targets": ["Embedding"], **of_rows, "input_activations": None},
            {"targets": ["re:.*lm_head$"], **of_rows, "input_activations": inputs},
        ]
        if self._has_experts:
            groups.append({"targets": [r"re:.*\.experts\..*"], **of_all, "format": PACKED})
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": "mixed-precision" if self._is_packed or self._has_experts else UNPACKED,
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": self._kept,
        }


def _group(size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size}


def _weights(num_bits: int, more: dict[str, Any]) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": "int", "symmetric": True, "dynamic": False, **more}


def _unpacked(module: str, integers_NK: Tensor, scales_NG: Tensor) -> Iterator[tuple[str, Array]]:
    yield f"{module}.weight", integers_NK.numpy()
    yield f"{module}.weight_scale", scales_NG.contiguous().numpy()


def _packed(module: str, integers_NK: Tensor, scales_NG: Tensor, num_bits: int) -> Iterator[tuple[str, Array]]:
    yield f"{module}.weight_packed", packed(integers_NK.numpy(), num_bits)
    yield f"{module}.weight_scale", scales_NG.contiguous().numpy()
    yield f"{module}.weight_shape", np.array(integers_NK.shape, dtype=np.int64)


def packed(integers_NK: npt.NDArray[np.int8], num_bits: int) -> npt.NDArray[np.int32]:
    """Integers (N, W) with the values' unsigned forms side by side, the first in the lowest bits; rows are filled with
    zeros."""
    per_word = WORD_BITS // num_bits
    unsigned_NK = integers_NK.astype(np.int64) + 2 ** (num_bits - 1)
    filled_NK = np.pad(unsigned_NK, ((0, 0), (0, -integers_NK.shape[1] % per_word)))
    shifts = np.arange(per_word, dtype=np.int64) * num_bits
    words_NW: npt.NDArray[np.int64] = (filled_NK.reshape(len(integers_NK), -1, per_word) << shifts).sum(-1)
    return words_NW.astype(np.uint32).view(np.int32)
