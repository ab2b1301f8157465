"""The families of models that can be read from transformers' directories, and written to them."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from orchestrator.checkpoint.hf.family import Family
from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec


def _same(*keys: str) -> dict[str, str]:
    """Keys that are ours under their own names."""
    return {key: key for key in keys}


_DENSE = _same("intermediate_size")
_EXPERTS = _same("num_experts_per_tok", "moe_intermediate_size")
_SHARED = _same("n_routed_experts", "n_shared_experts", "routed_scaling_factor")
_GROUPED = {**_DENSE, **_EXPERTS, **_SHARED, **_same("n_group", "topk_group", "first_k_dense_replace")}
_LATENT = _same("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
_SOFTMAX = {
    "scoring_func": "softmax",
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
_NO_WINDOW = {"use_sliding_window": False}  # attention sees all earlier tokens, whatever sliding_window is

GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    keys={**_GROUPED, **_same("attention_bias"), "use_qk_norm": "qk_norm"},
    is_ours={"scoring_func": "sigmoid", "norm_topk_prob": True},
    defaults={
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    fixed={"norm_topk_prob": True},
    also={"num_nextn_predict_layers": 0},
    router="mlp.gate.weight",
    correction="mlp.gate.e_score_correction_bias",
    stacked=True,
    partial_rotary_factor=0.5,
)
DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    keys={**_GROUPED, **_LATENT},
    is_ours={"scoring_func": "sigmoid", "norm_topk_prob": True, "attention_bias": False, "qk_norm": False},
    defaults={"q_lora_rank": None, "rope_interleave": True},
    fixed={"norm_topk_prob": True, "attention_bias": False, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    also={"num_nextn_predict_layers": 0},
    router="mlp.gate.weight",
    correction="mlp.gate.e_score_correction_bias",
    stacked=True,
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    keys={**_EXPERTS, "num_experts": "n_routed_experts", **_same("norm_topk_prob")},
    is_ours={**_SOFTMAX, "qk_norm": True, "attention_bias": False, "first_k_dense_replace": 0},
    aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
    defaults={"norm_topk_prob": False},
    fixed={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], **_NO_WINDOW},
    router="mlp.gate.weight",
    stacked=True,
)
MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    keys={
        **_same("num_experts_per_tok"),
        "num_local_experts": "n_routed_experts",
        "intermediate_size": "moe_intermediate_size",
    },
    is_ours={
        **_SOFTMAX,
        "norm_topk_prob": True,
        "qk_norm": False,
        "attention_bias": False,
        "first_k_dense_replace": 0,
    },
    defaults={"rms_norm_eps": 1e-5},
    fixed={"sliding_window": None},
    router="block_sparse_moe.gate.weight",
    experts="block_sparse_moe.experts.{expert}",
    projections=("w1", "w3", "w2"),
    rope_theta=1e6,
)
OLMOE = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    keys={
        **_same("num_experts_per_tok", "norm_topk_prob"),
        "num_experts": "n_routed_experts",
        "intermediate_size": "moe_intermediate_size",
    },
    is_ours={**_SOFTMAX, "qk_norm": "all_heads", "attention_bias": False, "first_k_dense_replace": 0},
    divides_hidden=True,
    aliases={"num_local_experts": "num_experts"},
    defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
    fixed={"attention_bias": False, "clip_qkv": None},
    router="mlp.gate.weight",
    stacked=True,
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=_DENSE,
    is_ours={"qk_norm": False, "attention_bias": False},
    fixed={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=_DENSE,
    is_ours={"qk_norm": True, "attention_bias": False},
    defaults={"head_dim": 128},
    fixed={"attention_bias": False, **_NO_WINDOW},
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=_DENSE,
    is_ours={"qk_norm": False, "attention_bias": True},
    fixed=_NO_WINDOW,
)
# In the order in which they are tried for an export: dense ones first, as they say more of a dense model.
FAMILIES = (LLAMA, QWEN3, QWEN2, GLM4_MOE, DEEPSEEK_V3, QWEN3_MOE, MIXTRAL, OLMOE)
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises UsageError for an architecture that none has."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in BY_ARCHITECTURE:
        return BY_ARCHITECTURE[architectures[0]]
    named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else json.dumps(architectures)
    nearest = get_close_matches(named, BY_ARCHITECTURE, n=1)
    hint = f"; nearest: {nearest[0]}" if nearest else ""
    raise UsageError(f"its architecture is {named}; those that can be read are {', '.join(BY_ARCHITECTURE)}{hint}")


def family_of_spec(spec: ModelSpec) -> Family:
    """The first family that can express a model of ours.

    Raises:
        UsageError: none can; it names what stands in the way of each.
    """
    refusals = {family.architecture: family.inexpressible(spec) for family in FAMILIES}
    for family in FAMILIES:
        if not refusals[family.architecture]:
            return family
    reasons = "; ".join(f"{name} has no {', '.join(keys)}" for name, keys in refusals.items())
    raise UsageError(
        f"no architecture of transformers that can be written expresses the model: {reasons}",
        unchanged="Nothing was written.",
    )
