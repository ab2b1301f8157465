"""Mapping between our model and `Glm4MoeForCausalLM` of transformers: names, split of tensors, configuration.

The maths is the same, so weights are only renamed, the embedding is multiplied by its scale, and the joint gate-and-up
matrices are split in two, or joined when such a directory is read (`orchestrator.checkpoint.hf.pretrained`).
Experts are written one by one, `experts.7.gate_proj.weight`, as in published checkpoints of this architecture.
`tests/integration/test_glm4_moe.py` compares logits and gradients with transformers.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec

ARCHITECTURE = "Glm4MoeForCausalLM"

_WHOLE = {  # our name within a layer: theirs
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.correction_bias_E": "mlp.gate.e_score_correction_bias",
}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
_MLP = re.compile(r"(mlp(?:\.experts\.\d+|\.shared)?)\.(gate_up|down)")
_EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_up|down)")
_SAME = (  # keys of both `config.json` and our `model` section
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
)
_DEFAULTS: dict[str, Any] = {  # defaults of transformers for keys that config.json lacks
    "head_dim": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "use_qk_norm": False,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_FIXED: dict[str, Any] = {"hidden_act": "silu", "norm_topk_prob": True}  # the only values that our model supports


def their_names(name: str) -> tuple[str, ...]:
    """Names in transformers of one of our parameters or buffers: one, or two for the halves of a gate-and-up matrix.

    Raises:
        KeyError: our model has no tensor of this name.
    """
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer is None:
        return (_OUTSIDE[name],)
    prefix, inner = f"model.layers.{layer[1]}.", layer[2]
    mlp = _MLP.fullmatch(inner)
    if mlp is None:
        return (prefix + _WHOLE[inner],)
    path = prefix + mlp[1].replace(".shared", ".shared_experts")
    kinds = ("down",) if mlp[2] == "down" else ("gate", "up")
    return tuple(f"{path}.{kind}_proj.weight" for kind in kinds)


def stacked_name(name: str) -> tuple[str, int] | None:
    """Name of the tensor that stacks all experts of a layer, as in memory and in some files, and the index of our
    tensor in it; None for a tensor that belongs to no expert."""
    expert = _EXPERT.fullmatch(name)
    return (f"model.layers.{expert[1]}.mlp.experts.{expert[3]}_proj", int(expert[2])) if expert else None


def renamed(name: str, tensor: npt.NDArray[Any], embedding_scale: float) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """One of our tensors, converted to the names and values of transformers. Raises KeyError for an unknown name."""
    names = their_names(name)
    if name == "embedding.weight":
        tensor = tensor * np.float32(embedding_scale)
    yield from zip(names, np.split(tensor, len(names)), strict=True)


def shapes(spec: ModelSpec, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter and buffer of our model."""
    wide, queries, keys = (
        spec.hidden_size,
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
    yield from (("embedding.weight", (vocab_size, wide)), ("norm.weight", (wide,)), ("head", (vocab_size, wide)))
    within = {
        "attention_norm.weight": (wide,),
        "attention.query": (queries, wide),
        "attention.key": (keys, wide),
        "attention.value": (keys, wide),
        "attention.output": (wide, queries),
        "mlp_norm.weight": (wide,),
    }
    if spec.attention_bias:
        within |= {f"attention.{kind}_bias": (n,) for kind, n in (("query", queries), ("key", keys), ("value", keys))}
    if spec.qk_norm:
        within |= {f"attention.{kind}_norm.weight": (spec.head_dim,) for kind in ("query", "key")}
    routed = {
        "mlp.router.weight": (spec.n_routed_experts, wide),
        "mlp.router.correction_bias_E": (spec.n_routed_experts,),
    }
    widths = {f"experts.{expert}.": spec.moe_intermediate_size for expert in range(spec.n_routed_experts)}
    if spec.n_shared_experts:
        widths["shared."] = spec.n_shared_experts * spec.moe_intermediate_size
    for layer in range(spec.num_hidden_layers):
        dense = layer < spec.first_k_dense_replace
        for inner, shape in within.items() if dense else (within | routed).items():
            yield f"layers.{layer}.{inner}", shape
        for mlp, width in ({"": spec.intermediate_size} if dense else widths).items():
            yield f"layers.{layer}.mlp.{mlp}gate_up", (2 * width, wide)
            yield f"layers.{layer}.mlp.{mlp}down", (wide, width)


def configuration(spec: ModelSpec, vocab_size: int, sequence_length: int, dtype: str) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        UsageError: the architecture cannot express the model.
    """
    if spec.router != "sigmoid":
        raise UsageError(
            f"model.router is {spec.router}; {ARCHITECTURE} has sigmoid routers only",
            unchanged="Nothing was written.",
        )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "glm4_moe",
        "dtype": dtype,
        **{key: getattr(spec, key) for key in _SAME},
        "use_qk_norm": spec.qk_norm,
        "vocab_size": vocab_size,
        "max_position_embeddings": sequence_length,
        "initializer_range": spec.initializer_range,
        "tie_word_embeddings": False,
        "rope_parameters": _ROPE | {"rope_theta": spec.rope_theta, "partial_rotary_factor": spec.partial_rotary_factor},
        **_FIXED,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
    }


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as our `model` section.

    Raises:
        UsageError: another architecture, missing keys, or values that our model does not support. It names all of them.
    """
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise UsageError(f"its architecture is {_named(architectures)}; only {ARCHITECTURE} can be read")
    known = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    if missing := [key for key in _SAME if key not in known]:
        raise UsageError(f"it lacks {', '.join(missing)}")
    rope = _ROPE | {key: config[key] for key in _ROPE if config.get(key) is not None}
    for scaling in ("rope_scaling", "rope_parameters"):  # keys of older and newer versions of transformers
        rope |= config.get(scaling) or {}
    wrong = {key: known[key] for key, value in _FIXED.items() if known.get(key, value) != value}
    wrong |= {
        key: rope[key]
        for key, value in (("rope_type", "default"), ("type", "default"))
        if rope.get(key, value) != value
    }
    if wrong:
        shown = ", ".join(f"{key} {json.dumps(value)}" for key, value in wrong.items())
        raise UsageError(f"it has {shown}, which no model of ours can have")
    if known["head_dim"] is None:
        known["head_dim"] = int(known["hidden_size"]) // int(known["num_attention_heads"])
    return {
        **{key: known[key] for key in _SAME},
        "qk_norm": known["use_qk_norm"],
        "router": "sigmoid",
        "rope_theta": float(rope["rope_theta"]),
        "partial_rotary_factor": float(rope["partial_rotary_factor"]),
    }


def _named(architectures: object) -> str:
    return ", ".join(map(str, architectures)) if isinstance(architectures, list) else json.dumps(architectures)
