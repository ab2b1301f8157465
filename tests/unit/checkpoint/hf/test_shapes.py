"""Our model's tensors, listed without torch: those of the model that is built."""

from typing import Any

import pytest

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.model.factory import catalogue
from orchestrator.spec.model import ModelSpec

EVERYWHERE = {"r": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scoring_func": "softmax", "first_k_dense_replace": 0, "n_shared_experts": 0},
        {"first_k_dense_replace": 3, "vocab_size": 512},
        {"qk_norm": True, "attention_bias": True},
        {"qk_norm": "all_heads", "n_shared_experts": 2, "moe_intermediate_size": 33},
        {"kv_lora_rank": 16, "n_routed_experts": 12},
        {"kv_lora_rank": 16, "q_lora_rank": 8, "bias_update_speed": 0.0},
        {"init_from": "/base", "qk_norm": True, "attention_bias": True, "lora": EVERYWHERE},
        {
            "init_from": "/base",
            "kv_lora_rank": 16,
            "q_lora_rank": 8,
            "lora": {"target_modules": ["q_b_proj", "o_proj"]},
        },
        {"router": {"scorer": "attention", "rank": 3, "selection": "top_p"}},
        {"router": {"scorer": "context", "num_heads": 2, "rank": 3, "capacity_factor": 1.5}},
    ],
)
def test_what_is_listed_is_what_is_built(keys: dict[str, Any]) -> None:
    spec = ModelSpec(num_hidden_layers=3, **keys)
    params, buffers = listed(spec, 300)
    built, kept = catalogue(spec, 300)
    assert params == built and buffers == kept and {param.blocks for param in params} == {1, 2}
