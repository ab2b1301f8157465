"""The section `train.quantization`: what it takes, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.elastic.inventory import inventory
from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec


def _job(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **quantization: Any) -> JobSpec:
    keys = {"name": "quantized", "model": {"vocab_size": 64, "n_routed_experts": 4, **(model or {})}}
    return JobSpec.model_validate(keys | {"train": {"quantization": quantization, **(train or {})}})


def test_matrices_of_products_are_quantized_and_nothing_else() -> None:
    job = _job({"first_k_dense_replace": 1, "router": {"scorer": "attention"}})
    assert job.train.quantization is not None
    params, _ = listed(job.model, 64)
    taken = {param.name.rpartition(".")[2] for param in params if job.train.quantization.has(param.name, param.shape)}
    left = {param.name for param in params if not job.train.quantization.has(param.name, param.shape)}
    assert taken == {"query", "key", "value", "output", "gate_up", "down"}
    assert {"head", "embedding.weight", "norm.weight", "layers.1.mlp.router.scorer.query"} <= left


@pytest.mark.parametrize(
    ("quantization", "problem"),
    [
        ({"params": ["*.router.*"]}, r"params: \*.router.\* fits no matrix that can be quantized: embeddings, the out"),
        ({"params": ["*.down", "head"]}, "params: head fits no matrix"),
        ({"params": ["*norm*"]}, "fits no matrix that can be quantized"),
        ({"params": ["layers.*.experts.1.*"]}, r"picks some of the experts' layers.\d.mlp.experts.\*.gate_up"),
        ({"params": ["layers.*.experts.[0-3].*"]}, r"picks some of the experts' layers.\d.mlp.experts.\*.gate_up"),
        ({"group_size": 48}, r"group_size: 48 doesn't divide the rows of layers.0.attention.query, which have \d+"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_anything_starts(
    quantization: dict[str, Any], problem: str
) -> None:
    job = _job(**quantization)
    params, buffers = listed(job.model, 64)
    with pytest.raises(UsageError, match=problem) as caught:
        inventory(params, job, buffers)
    assert caught.value.remedy and caught.value.unchanged


@pytest.mark.parametrize(
    ("model", "train", "quantization", "problem"),
    [
        ({}, {"float8": True}, {}, "float8 must be false with quantization"),
        ({"impl": "transformers", "init_from": "/m"}, {}, {}, "quantization must be null with a model of"),
        (
            {"init_from": "/m", "lora": {"lora_dropout": 0.1}},
            {},
            {},
            "lora_dropout must be 0 with quantization",
        ),
        (
            {},
            {"pruning": {"targets": [{"pattern": "neurons"}], "end_step": 9}},
            {"weight_dtype": "int4", "group_size": 32},
            "group_size must be null where neurons or heads are pruned",
        ),
        (
            {"attention_bias": True},
            {"pruning": {"targets": [{"pattern": "heads"}], "end_step": 9}},
            {},
            "activation_dtype must be null where heads are pruned of a model with attention_bias",
        ),
        ({}, {}, {"weight_dtype": "int3"}, "int8"),
        ({}, {}, {"group_size": 4}, "group_size"),
    ],
)
def test_rules_between_sections(
    model: dict[str, Any], train: dict[str, Any], quantization: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        _job(model, train, **quantization)
