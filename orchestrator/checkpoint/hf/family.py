"""A family of models of transformers as our model: keys of its `config.json`, and names of its tensors, both ways.

The maths is the same, so weights are only renamed, the embedding is multiplied by its scale, and the joint gate-and-up
matrices are split in two, or joined when such a directory is read (`orchestrator.checkpoint.hf.pretrained`).
`orchestrator.checkpoint.hf.families` lists the families, each a value of the class here;
`tests/integration/test_families.py` compares logits and gradients of each with transformers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from orchestrator.spec.pretrained.config_json import IN_CONFIG, LINEAR, LLAMA3, USED_BY, YARN, RopeScalingSpec

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
_WITHIN = {  # our name within a layer: theirs
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
    "attention.query_down": "self_attn.q_a_proj.weight",
    "attention.query_down_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query_up": "self_attn.q_b_proj.weight",
    "attention.latent": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.latent_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.key_value": "self_attn.kv_b_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
_MLP = re.compile(r"(mlp(?:\.experts\.\d+|\.shared)?)\.(gate_up|down)")
_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_up|down)")
ROUTER = "mlp.router.scorer.weight"
QUERY, CONTEXT_QUERY, KEYS = (f"mlp.router.scorer.{name}" for name in ("query", "context_query", "keys"))
CORRECTION, MASS = "mlp.router.correction_bias_E", "mlp.router.selection.mass_offset_1"
BUFFERS = (CORRECTION, MASS)
_COMMON = (  # keys of every family's config.json and of our `model` section, under one name
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
_FIXED: dict[str, Any] = {"hidden_act": "silu"}  # the only values that our model supports
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """How models of one architecture are ours.

    Args:
        architecture, model_type: as in `config.json`.
        keys: further keys: ours, by theirs.
        aliases: other names of keys, in files of other versions.
        defaults: values that transformers takes for keys that `config.json` lacks, under their names.
        fixed: their keys that may have one value only.
        also: further keys that are written.
        is_ours: values of our keys that all its models have.
        router: name of a router's matrix; None: without experts.
        correction: name of its correction bias; None: it has none.
        experts: path of an expert, with its number as `{expert}`.
        projections: names of the gate, up and down matrices of an expert, and of an MLP.
        stacked: whether some files stack a layer's experts.
        divides_hidden: whether head_dim is always hidden_size over num_attention_heads.
        rope_theta, partial_rotary_factor: what transformers takes where `config.json` lacks them.
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    is_ours: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    router: str | None = None
    correction: str | None = None
    experts: str = "mlp.experts.{expert}"
    projections: tuple[str, str, str] = PROJECTIONS
    stacked: bool = False
    divides_hidden: bool = False
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0

    @property
    def is_latent(self) -> bool:
        """Whether its models have multi-head latent attention."""
        return "kv_lora_rank" in self.keys

    # -- tensors -----------------------------------------------------------------------------------------------

    def their_names(self, name: str) -> tuple[str, ...]:
        """Names in transformers of one of our parameters or buffers: one, or two for the halves of a gate-and-up
        matrix; none for a buffer that the family doesn't have.

        Raises:
            KeyError: our model has no tensor of this name.
        """
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer is None:
            return (_OUTSIDE[name],)
        prefix, inner = f"model.layers.{layer[1]}.", layer[2]
        if inner in BUFFERS:
            return (prefix + self.correction,) if inner == CORRECTION and self.correction is not None else ()
        if inner == ROUTER and self.router is not None:
            return (prefix + self.router,)
        mlp = _MLP.fullmatch(inner)
        if mlp is None:
            return (prefix + _WITHIN[inner],)
        expert = re.fullmatch(r"mlp\.experts\.(\d+)", mlp[1])
        path = self.experts.format(expert=expert[1]) if expert else mlp[1].replace(".shared", ".shared_experts")
        gate, up, down = self.projections if expert else PROJECTIONS
        return tuple(f"{prefix}{path}.{kind}.weight" for kind in ((down,) if mlp[2] == "down" else (gate, up)))

    def stacked_name(self, name: str) -> tuple[str, int] | None:
        """Name of the tensor that stacks all experts of a layer, as in memory and in some files, and the index of our
        tensor in it; None for a tensor that belongs to no expert."""
        expert = _EXPERT.fullmatch(name) if self.stacked else None
        return (f"model.layers.{expert[1]}.mlp.experts.{expert[3]}_proj", int(expert[2])) if expert else None

    def renamed(
        self, name: str, tensor: npt.NDArray[Any], embedding_scale: float
    ) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """One of our tensors, converted to the names and values of transformers. Raises KeyError for an unknown
        name."""
        names = self.their_names(name)
        if name == "embedding.weight":
            tensor = tensor * np.float32(embedding_scale)
        if names:
            yield from zip(names, np.split(tensor, len(names)), strict=True)

    # -- configuration -----------------------------------------------------------------------------------------

    def configuration(self, spec: ModelSpec, vocab_size: int, sequence_length: int, dtype: str) -> dict[str, Any]:
        """The content of `config.json` for a model that the family can express (`inexpressible`)."""
        rope: dict[str, Any] = _ROPE | {"rope_theta": spec.rope_theta}
        rope["partial_rotary_factor"] = spec.partial_rotary_factor
        if spec.rope_scaling is not None:
            rope |= spec.rope_scaling.in_config()
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": dtype,
            "torch_dtype": dtype,  # for transformers before version 5, and other tools
            **{key: getattr(spec, key) for key in _COMMON},
            **{theirs: getattr(spec, ours) for theirs, ours in self.keys.items()},
            "vocab_size": vocab_size,
            "max_position_embeddings": sequence_length,
            "initializer_range": spec.initializer_range,
            "tie_word_embeddings": False,
            "rope_parameters": rope,
            "rope_theta": spec.rope_theta,
            **({} if spec.partial_rotary_factor == 1.0 else {"partial_rotary_factor": spec.partial_rotary_factor}),
            **_FIXED,
            **self.fixed,
            **self.also,
            "use_cache": True,
        }

    def inexpressible(self, spec: ModelSpec) -> list[str]:
        """Keys of ours, with their values, for which the family has no counterpart; empty: it can express the model."""
        wanted = dict(self.is_ours)
        if self.router is None:
            wanted = {key: value for key, value in wanted.items() if key in ("qk_norm", "attention_bias")}
            wanted["first_k_dense_replace"] = spec.num_hidden_layers
        elif self.correction is None:
            wanted["bias_update_speed"] = 0.0
        if self.partial_rotary_factor == 1.0:
            wanted["partial_rotary_factor"] = 1.0
        if not self.is_latent:
            wanted["kv_lora_rank"] = None
        elif spec.kv_lora_rank is None:
            return ["kv_lora_rank null"]
        if self.router is not None:
            kept = {"scorer", "rank"} if folds(spec) else set[str]()
            wanted["router"] = RouterSpec(**spec.router.model_dump(include=kept | {"capacity_factor"}))
        if self.divides_hidden:
            wanted["head_dim"] = spec.hidden_size // spec.num_attention_heads
        if "qk_norm" in self.keys.values():
            wanted["qk_norm"] = bool(spec.qk_norm) and spec.qk_norm != "all_heads"
        has = {key: getattr(spec, key) for key in wanted}
        has["router"] = spec.router.model_dump(exclude_defaults=True)
        return [f"{key} {json.dumps(has[key])}" for key, value in wanted.items() if getattr(spec, key) != value]

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A `config.json` as our `model` section.

        Raises:
            UsageError: missing keys, or values that our model does not support. It names all of them.
        """
        if config.get("quantization_config"):
            raise UsageError("its weights are quantized (quantization_config); export them in fp32 or bf16")
        known = {"head_dim": None, "rms_norm_eps": 1e-6} | dict(self.defaults)
        known |= {self.aliases.get(key, key): value for key, value in config.items() if value is not None}
        if missing := [key for key in (*_COMMON, *self.keys) if key not in known]:
            raise UsageError(f"it lacks {', '.join(missing)}")
        rope = _ROPE | {"partial_rotary_factor": self.partial_rotary_factor, "rope_theta": self.rope_theta}
        rope |= {key: config[key] for key in _ROPE if config.get(key) is not None}
        for key in ("rope_scaling", "rope_parameters"):  # of older and newer versions of transformers
            rope |= config.get(key) or {}
        fixed = _FIXED | dict(self.fixed)
        wrong = {key: known[key] for key, value in fixed.items() if known.get(key, value) != value}
        scaling = _scaling_of(rope, config)
        if scaling is not None and scaling["rope_type"] not in (LINEAR, LLAMA3, YARN):
            wrong["rope_type"] = scaling["rope_type"]
        if wrong:
            shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in wrong.items())
            raise UsageError(f"it has {shown}, which our models don't support")
        divided = int(known["hidden_size"]) // int(known["num_attention_heads"])
        if self.is_latent:
            known["head_dim"] = known["qk_rope_head_dim"]  # transformers' value; our model doesn't use it
        if known["head_dim"] is None:
            known["head_dim"] = divided
        if self.divides_hidden and known["head_dim"] != divided:
            raise UsageError(f"it has head_dim {known['head_dim']}, which {self.architecture} takes to be {divided}")
        found = {key: known[key] for key in _COMMON} | {ours: known[theirs] for theirs, ours in self.keys.items()}
        if self.router is None:
            found["first_k_dense_replace"] = found["num_hidden_layers"]
        return {
            **{key: ModelSpec.model_fields[key].default for key in IN_CONFIG - {"head_dim"}},  # that it has no use for
            **found,
            **self.is_ours,
            "rope_theta": float(rope["rope_theta"]),
            "partial_rotary_factor": float(rope["partial_rotary_factor"]),
            "rope_scaling": scaling,
        }


def folds(spec: ModelSpec) -> bool:
    """Whether routers have two matrices, whose product is the matrix of an equal linear one (`folded`)."""
    return spec.router.scorer == "attention"


def folded(query: npt.NDArray[np.float32], keys: npt.NDArray[np.float32], spec: ModelSpec) -> npt.NDArray[np.float32]:
    """The matrix (experts, hidden size) of the linear router that is equal to one with queries (rank, hidden size) and
    keys (experts, rank)."""
    product: npt.NDArray[np.float64] = keys.astype(np.float64) @ query.astype(np.float64) * spec.router_key_scale
    return product.astype(np.float32)


def _scaling_of(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scaling of positions in a `config.json`, with what transformers takes for keys that it lacks; None: without."""
    kind = rope["rope_type"] if rope["rope_type"] != "default" else rope.get("type", "default")
    if kind == "default":
        return None
    found = {key: rope[key] for key in RopeScalingSpec.model_fields if rope.get(key) is not None} | {"rope_type": kind}
    if kind in USED_BY["original_max_position_embeddings"]:
        longest = config.get("max_position_embeddings")
        found.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings") or longest)
        if "factor" not in found and longest is not None:
            found["factor"] = longest / found["original_max_position_embeddings"]
    return found
