"""Our model in Hugging Face's format: the names, the split and the configuration of `Glm4MoeForCausalLM`.

The maths is the same, so weights are only renamed, and the joint gate-and-up matrices cut in two. Experts are written
one by one, `experts.7.gate_proj.weight`, as published checkpoints of this architecture have them.
`tests/integration/test_glm4_moe.py` compares logits and gradients with transformers.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import UsageError
from orchestrator.spec.model import ModelSpec

ARCHITECTURE = "Glm4MoeForCausalLM"

_WHOLE = {  # ours within a layer: theirs
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


def renamed(name: str, tensor: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """A tensor of ours, parameter or buffer, under their names: one, or two for a gate-and-up matrix.

    Raises:
        KeyError: we have no tensor of this name.
    """
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer is None:
        yield _OUTSIDE[name], tensor
        return
    prefix, inner = f"model.layers.{layer[1]}.", layer[2]
    mlp = _MLP.fullmatch(inner)
    if mlp is None:
        yield prefix + _WHOLE[inner], tensor
        return
    path = prefix + mlp[1].replace(".shared", ".shared_experts")
    if mlp[2] == "down":
        yield f"{path}.down_proj.weight", tensor
    else:
        gate, up = np.split(tensor, 2)
        yield f"{path}.gate_proj.weight", gate
        yield f"{path}.up_proj.weight", up


def configuration(spec: ModelSpec, vocab_size: int, sequence_length: int, dtype: str) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        UsageError: the architecture has no such model.
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
        "vocab_size": vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": spec.rope_fraction,
        },
        "attention_bias": spec.attention_bias,
        "use_qk_norm": spec.qk_norm,
        "moe_intermediate_size": spec.expert_intermediate_size,
        "num_experts_per_tok": spec.top_k,
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": spec.num_shared_experts,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "n_group": spec.num_expert_groups,
        "topk_group": spec.top_k_groups,
        "first_k_dense_replace": spec.num_dense_layers,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
    }
