"""The keys of `model.lora`: what is trained with it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import load_job
from orchestrator.spec.pretrained.lora import LoraSpec
from orchestrator.spec.train import TrainSpec

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
}


def _job(lora: dict[str, Any], model: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    given = {"init_from": "/base", "lora": lora, **(model or {})}
    return JobSpec.model_validate({"name": "try", "model": given, "train": train})


def test_adapters_alone_are_trained_unless_more_is_asked_for() -> None:
    job = _job({})
    assert job.train.trainable == ("*.lora.*",) and job.model.bias_update_speed == 0.0
    assert JobSpec.model_validate_json(job.model_dump_json(by_alias=True)) == job
    assert JobSpec.model_validate(job.model_dump(by_alias=True, exclude_unset=True)) == job
    assert _job({}, trainable=["*.lora.*", "head"]).train.trainable == ("*.lora.*", "head")
    with_sections = JobSpec(name="try", model=job.model, train=TrainSpec(max_steps=7))
    assert with_sections.train == TrainSpec(max_steps=7, trainable=("*.lora.*",))
    assert JobSpec(name="try").train.trainable == ("*",)


def test_a_job_file_names_modules_as_peft_does(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    modules = "[q_proj, gate_proj, up_proj]"
    file.write_text(f"schema: v1\nname: try\nmodel: {{init_from: base, lora: {{r: 4, target_modules: {modules}}}}}\n")
    job = load_job(file)
    assert job.model.lora == LoraSpec(r=4, target_modules=("q_proj", "gate_proj", "up_proj"))
    assert job.model.lora.matrices == {"query", "gate_up"} and job.model.lora.scale == 4.0


@pytest.mark.parametrize(
    ("lora", "model", "rule"),
    [
        ({"target_modules": ["gate_proj"]}, {}, "must have both gate_proj and up_proj, which are one matrix here"),
        ({"target_modules": ["lm_head"]}, {}, "must be some of q_proj, "),
        ({"target_modules": []}, {}, "at least 1 item"),
        ({}, {"init_from": None}, "lora needs a pretrained model in init_from"),
        (
            {},
            {"upcycle": True},
            "lora needs a pretrained model in init_from, whose weights stay as they are; got u",
        ),
        ({}, {"impl": "transformers"}, "lora is of our own model; got transformers"),
    ],
)
def test_what_adapters_refuse(lora: dict[str, Any], model: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _job(lora, model)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "model", "rule"),
    [
        ({"target_modules": ["q_proj"]}, {"kv_lora_rank": 8, "q_lora_rank": 8}, "q_a_proj, q_b_proj"),
        ({"target_modules": ["kv_b_proj"]}, {}, "q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ({"target_modules": ["down_proj"], "lora_dropout": 0.1}, {}, "lora_dropout must be 0 with adapters of experts"),
    ],
)
def test_what_adapters_refuse_of_a_model_whose_sizes_are_known(
    lora: dict[str, Any], model: dict[str, Any], rule: str
) -> None:
    known = {key: value for key, value in JobSpec(name="sizes").model.model_dump().items() if key != "lora"}
    with pytest.raises(ValidationError) as caught:
        _job(lora, {**known, **SIZES, "init_from": "/base", "embedding_scale": 1.0, "bias_update_speed": 0.0, **model})
    assert rule in str(caught.value)


def test_the_number_of_experts_stays_with_adapters() -> None:
    with pytest.raises(ValidationError, match="the weights of other experts are in no file"):
        JobSpec.model_validate(
            {
                "name": "try",
                "model": {"init_from": "/base", "lora": {}},
                "experts": {"schedule": [{"at_step": 10, "num_experts": 16}]},
            }
        )
