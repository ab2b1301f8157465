"""The `train.quantization` section: training with the rounding that integer weights and inputs bring at inference.

Integers are symmetric around 0, with a scale of the largest absolute value over 127.5 (8 bits) or 7.5 (4 bits), as
compressed-tensors and torchao have it.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from orchestrator.spec.keys.section import Broken, Path, Section
from orchestrator.spec.pretrained.lora import MATRICES

NUM_BITS = {"int8": 8, "int4": 4}
NEVER = "embeddings, the output matrix, routers, norms and biases"
_OURS = re.compile(rf"(.+\.)?(attention|mlp(\.experts\.\d+|\.shared)?)\.({'|'.join(sorted(set(MATRICES.values())))})")


class QuantizationSpec(Section):
    """Formats of weights and of their inputs. Nothing of it is state: weights keep their format in training."""

    weight_dtype: Literal["int8", "int4"] = Field(default="int8", description="Integers of weights.")
    group_size: int | None = Field(
        default=None,
        ge=8,
        description="Weights of a row that share a scale; it must divide the rows of all these matrices. null: a scale "
        "per row.",
    )
    activation_dtype: Literal["int8"] | None = Field(
        default="int8",
        description="Integers of a matrix's inputs, with a scale per token. null: inputs aren't rounded.",
    )
    params: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Patterns of the matrices' names, such as layers.*.experts.* (fnmatch): of attention, MLPs and "
        f"experts. In training, {NEVER} are never quantized.",
    )

    @property
    def num_bits(self) -> int:
        """Of a weight."""
        return NUM_BITS[self.weight_dtype]

    def has(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the matrix of this name is quantized."""
        return is_quantizable(name, shape) and any(fnmatchcase(name, pattern) for pattern in self.params)


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix of attention, an MLP or an expert of our own model."""
    return len(shape) == 2 and _OURS.fullmatch(name) is not None


def broken_quantization(
    quantization: QuantizationSpec | None,
    origin: str | None,
    float8: bool,
    lora_dropout: float,
    prunes_units: bool,
    prunes_biased_heads: bool,
) -> Iterator[Broken]:
    """The rules between quantization and other sections that are broken.

    Args:
        origin: what builds the model, if that isn't our own.
        float8: whether products are computed in float8.
        lora_dropout: share of adapters' inputs that are left out.
        prunes_units: whether whole neurons or heads are pruned.
        prunes_biased_heads: whether heads are pruned of an attention with biases.
    """
    if quantization is None:
        return
    here: Path = ("train", "quantization")
    if origin is not None:
        rule = f"quantization must be null with a model of {origin}: it rounds the products of our own model"
        yield Broken((here, ("model", "impl"), ("model", "entrypoint")), rule)
    if float8:
        rule = "float8 must be false with quantization, which rounds the operands of the same products; got true"
        yield Broken((("train", "float8"), here), rule)
    if lora_dropout:
        rule = "lora_dropout must be 0 with quantization, which rounds weights with their adapters merged; got "
        yield Broken((("model", "lora", "lora_dropout"), here), f"{rule}{lora_dropout:g}")
    if prunes_units and quantization.group_size is not None:
        rule = "group_size must be null where neurons or heads are pruned: without them other weights would share a "
        yield Broken(((*here, "group_size"), ("train", "pruning")), f"{rule}scale; got {quantization.group_size}")
    if prunes_biased_heads and quantization.activation_dtype is not None:
        rule = (
            "activation_dtype must be null where heads are pruned of a model with attention_bias: a pruned head's bias "
        )
        yield Broken(((*here, "activation_dtype"), ("train", "pruning")), f"{rule}has a part in the scale of inputs")
