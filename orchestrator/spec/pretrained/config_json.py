"""What a model section shares with transformers: the directory or config that a model is made from, keys of its
`config.json`, and `model.rope_scaling`, the rotary positions of models whose context was extended after pretraining."""

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from orchestrator.spec.keys.section import Broken, Section, broken_unread, directory

# Keys of mixtures alone.
OF_EXPERTS = frozenset(
    {
        "first_k_dense_replace",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_shared_experts",
        "scoring_func",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
    }
)
# Keys that an init_from directory's config.json sets too.
IN_CONFIG = OF_EXPERTS | {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "attention_bias",
    "qk_norm",
    "rope_theta",
    "partial_rotary_factor",
    "rms_norm_eps",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "rope_scaling",
}
# Keys with the values by which a mixture of equal experts is the dense model that they come from.
UPCYCLED = {"n_shared_experts": 0, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
# Keys that say how large a model is that transformers builds (`impl: transformers`), of which its own config says all.
OF_TRANSFORMERS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    }
)

LINEAR, LLAMA3, YARN = "linear", "llama3", "yarn"
USED_BY = {  # keys that not every type reads
    "original_max_position_embeddings": (LLAMA3, YARN),
    "low_freq_factor": (LLAMA3,),
    "high_freq_factor": (LLAMA3,),
    "beta_fast": (YARN,),
    "beta_slow": (YARN,),
    "mscale": (YARN,),
    "mscale_all_dim": (YARN,),
    "attention_factor": (YARN,),
    "truncate": (YARN,),
}


class RopeScalingSpec(Section):
    """How rotary embedding's wavelengths are stretched. Names and meaning are transformers'."""

    rope_type: Literal["linear", "llama3", "yarn"] = Field(
        description="linear: all alike. llama3: the long ones, as in Llama 3.1. yarn: the long ones, and attention is "
        "sharpened (arXiv:2309.00071)."
    )
    factor: float = Field(ge=1, description="By how much; of yarn also by how much the context is longer.")
    original_max_position_embeddings: int | None = Field(
        default=None, ge=1, description="Tokens of the context before. Needed for llama3 and yarn."
    )
    low_freq_factor: float = Field(
        default=1.0, gt=0, description="Of llama3: wavelengths above the former context over this are stretched whole."
    )
    high_freq_factor: float = Field(
        default=4.0, gt=0, description="Of llama3: those below the former context over this stay as they are."
    )
    beta_fast: float = Field(
        default=32.0, gt=0, description="Of yarn: wavelengths that fit this often into the former context stay."
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="Of yarn: those that fit at most this often are stretched whole."
    )
    mscale: float | None = Field(default=None, ge=0, description="Of yarn: strength of what sharpens attention.")
    mscale_all_dim: float | None = Field(
        default=None, ge=0, description="Of yarn: of the part of it that acts on whole heads (kv_lora_rank)."
    )
    attention_factor: float | None = Field(
        default=None, gt=0, description="Of yarn: the factor itself. null: from factor, mscale and mscale_all_dim."
    )
    truncate: bool = Field(default=True, description="Of yarn: begin and end the transition at whole dimensions.")

    def in_config(self) -> dict[str, object]:
        """The keys that its type reads and that are set, as transformers wants them."""
        found = self.model_dump(exclude_none=True)
        return {key: value for key, value in found.items() if self.rope_type in USED_BY.get(key, (self.rope_type,))}

    def broken_rules(self) -> Iterator[Broken]:
        yield from broken_unread(self, "rope_type", [self.rope_type], USED_BY)
        if self.rope_type != LINEAR and self.original_max_position_embeddings is None:
            rule = f"original_max_position_embeddings is needed for {self.rope_type}"
            yield Broken((("original_max_position_embeddings",), ("rope_type",)), rule)
        if self.high_freq_factor <= self.low_freq_factor:
            rule = f"high_freq_factor must be above low_freq_factor; got {self.high_freq_factor} and "
            yield Broken((("high_freq_factor",), ("low_freq_factor",)), f"{rule}{self.low_freq_factor}")


class ModelSource(Section):
    """What a model is made from: a directory that transformers has saved, a config of transformers, or sizes alone."""

    init_from: Annotated[str, AfterValidator(directory)] | None = Field(
        default=None,
        description="Directory of a model saved by transformers, of one of the families in docs/pretrained.md: its "
        "weights replace random ones. Omitted sizes come from its config.json, others must agree. Every worker reads "
        "what it holds of it.",
    )
    impl: Literal["native", "transformers"] = Field(
        default="native",
        description="transformers: its implementation of the architecture in config is trained, for architectures that "
        "ours does not have; experts are spread over workers all the same (docs/pretrained.md).",
    )
    config: dict[str, JsonValue] = Field(
        default={},
        description="With impl: transformers, keys of the model's config.json, model_type among them; sizes above "
        "follow from it. Default: that of init_from.",
    )
    upcycle: bool = Field(
        default=False,
        description="true: init_from is a dense model, whose layers from first_k_dense_replace on (default 0) become "
        "mixtures. Each of their experts begins as the layer's MLP, so the mixture begins as the dense model; routers "
        "begin at random (sparse upcycling, arXiv:2212.05055).",
    )

    def broken_upcycling(self) -> Iterator[Broken]:
        """The rules of `upcycle` that are broken."""
        if self.upcycle and self.init_from is None:
            yield Broken((("upcycle",), ("init_from",)), "upcycle needs a dense model in init_from; got none")
        for key, value in UPCYCLED.items() if self.upcycle else ():
            if key in self.model_fields_set and getattr(self, key) != value:
                rule = f"{key} must be {json.dumps(value)} with upcycle, so that the mixture begins as the dense model"
                yield Broken(((key,), ("upcycle",)), f"{rule}; got {json.dumps(getattr(self, key))}")
