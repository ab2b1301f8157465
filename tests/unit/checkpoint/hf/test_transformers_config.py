"""Sizes of a model that transformers builds, from its config alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.hf.pretrained import resolved
from orchestrator.checkpoint.hf.transformers_config import transformers_settings
from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 500}


@pytest.mark.parametrize(
    "names",
    [
        {"model_type": "dots1", "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32},
        {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32},
        {"model_type": "ernie4_5_moe", "moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 32},
        {
            "model_type": "hunyuan_v1_moe",
            "num_experts": 16,
            "moe_topk": 4,
            "moe_intermediate_size": 32,
            "intermediate_size": 99,
        },
    ],
)
def test_a_size_has_many_names(names: dict[str, Any]) -> None:
    found = transformers_settings({**SIZES, **names})
    assert (found["n_routed_experts"], found["num_experts_per_tok"], found["moe_intermediate_size"]) == (16, 4, 32)
    assert found["config"] == {**SIZES, **names}


def test_keys_of_training_may_differ_from_the_config() -> None:
    experts = {"n_routed_experts": [4, 4], "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = {"model_type": "dots1", "router_aux_loss_coef": 0.003, "initializer_range": 0.1, **SIZES, **experts}
    spec = resolved(ModelSpec(impl="transformers", config=config))
    assert (spec.bias_update, spec.bias_update_speed) == ("sign", 1e-3)
    assert (spec.router_aux_loss_coef, spec.initializer_range, spec.n_routed_experts) == (0.003, 0.1, 4)
    own = resolved(ModelSpec(impl="transformers", config=config, router_aux_loss_coef=0.1, bias_update_speed=0.0))
    assert (own.router_aux_loss_coef, own.bias_update_speed) == (0.1, 0.0)


def test_keys_of_the_job_win_over_the_directory(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mine = ModelSpec(impl="transformers", init_from=str(tmp_path), config={"attention_dropout": 0.1})
    assert resolved(mine, tmp_path).config == {**config, "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    with pytest.raises(UsageError, match="it lacks vocab_size"):
        resolved(mine, tmp_path)


def test_a_resolved_job_is_read_back_as_it_was() -> None:
    config = {"model_type": "qwen2_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    job = JobSpec(name="r", model=resolved(ModelSpec(impl="transformers", config=config)))
    assert JobSpec.model_validate_json(job.model_dump_json(by_alias=True)) == job


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"model_type": "dots1", "hidden_size": 8}, "it lacks num_hidden_layers, n_routed_experts or num_experts or"),
        ({**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 8}, "it lacks model_type"),
        (
            {"model_type": "x", **SIZES, "num_experts": [2, 3], "num_experts_per_tok": 1, "intermediate_size": 8},
            r"it has n_routed_experts \[2, 3\]; these must be whole numbers",
        ),
        (
            {
                "model_type": "x",
                **SIZES,
                "num_experts": 2,
                "num_experts_per_tok": 1,
                "intermediate_size": 8,
                "quantization_config": {"quant_method": "fp8"},
            },
            "it has quantization_config, and weights that are quantized can't be trained",
        ),
    ],
)
def test_what_no_plan_can_be_made_of_is_refused(config: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        transformers_settings(config)


def test_a_job_that_differs_from_its_config_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    with pytest.raises(UsageError, match="model.hidden_size is 32 and 64"):
        resolved(ModelSpec(impl="transformers", config=config, hidden_size=32))
