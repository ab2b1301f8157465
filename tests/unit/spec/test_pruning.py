"""The section `train.pruning`: its schedule, what it takes, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_spec import ParamSpec
from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.pruning import PruningSpec

NEURONS, HEADS = {"pattern": "neurons"}, {"pattern": "heads"}


def _job(*targets: dict[str, Any], model: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    pruning = {"targets": list(targets), "end_step": 50}
    keys = {"name": "pruned", "model": {"vocab_size": 64, **(model or {})}}
    return JobSpec.model_validate(keys | {"train": {"max_steps": 100, "pruning": pruning, **train}})


def _params(job: JobSpec) -> list[ParamSpec]:
    return [param.with_settings(job.train) for param in listed(job.model, 64)[0]]


def test_the_share_rises_fast_and_then_slowly_to_what_is_wanted() -> None:
    pruning = PruningSpec.model_validate({"targets": [NEURONS], "start_step": 10, "end_step": 45, "every": 10})
    due = [number for number in range(1, 101) if pruning.is_due(number)]
    assert due == [20, 30, 40, 45]
    shares = [pruning.progress(number) for number in due]
    assert shares[0] == pytest.approx(1 - (25 / 35) ** 3) and shares[-1] == 1.0 and shares == sorted(shares)
    assert [pruning.has_begun(number) for number in (20, 21)] == [False, True]
    soon = PruningSpec.model_validate({"targets": [NEURONS], "end_step": 3, "every": 10})
    assert [number for number in range(1, 9) if soon.is_due(number)] == [3] and soon.has_begun(4)


def test_shares_are_decimal() -> None:
    target = PruningSpec.model_validate({"targets": [{**NEURONS, "sparsity": 0.29}], "end_step": 3}).targets[0]
    assert target.count(100) == 29


def test_embeddings_output_routers_norms_and_biases_are_never_pruned() -> None:
    job = _job({"pattern": "unstructured"}, model={"attention_bias": True})
    pruned = {param.name.rpartition(".")[2] for param in _params(job) if param.is_pruned}
    assert pruned == {"query", "key", "value", "output", "gate_up", "down"}


def test_a_matrix_belongs_to_the_first_target_that_has_it() -> None:
    job = _job(HEADS, {"pattern": "2:4", "params": ["*.experts.*"]}, {"pattern": "unstructured", "sparsity": 0.9})
    assert job.train.pruning is not None
    of_pattern = {
        p.name: t.pattern for p in _params(job) if (t := job.train.pruning.target_of(p.name, p.shape)) is not None
    }
    assert of_pattern["layers.0.attention.query"] == "heads"
    assert of_pattern["layers.1.mlp.experts.0.down"] == "2:4"
    assert of_pattern["layers.0.mlp.down"] == "unstructured"


@pytest.mark.parametrize(
    ("targets", "keys", "message"),
    [
        ([{**NEURONS, "sparsity": 1.0}], {}, "less than 1"),
        ([{"pattern": "2:4", "sparsity": 0.6}], {}, "sparsity must be 0.5 with pattern 2:4; got 0.6"),
        ([{**NEURONS, "params": ["layers.*"]}], {}, r"params must be left out with pattern neurons.*got layers\.\*"),
        ([NEURONS, NEURONS], {}, "pattern neurons once, as it takes all of them; got it 2 times"),
        ([NEURONS], {"max_steps": 40}, "end_step must be at most train.max_steps; got 50 and 40"),
        ([HEADS], {"model": {"qk_norm": "all_heads"}}, "must not be heads with qk_norm: all_heads"),
        ([NEURONS], {"model": {"impl": "transformers", "config": {"model_type": "llama"}}}, "neurons aren't known"),
        (
            [{"pattern": "unstructured"}],
            {"model": {"init_from": "base", "lora": {}}},
            "pruning needs weights that are trained, and model.lora",
        ),
    ],
    ids=lambda each: None if isinstance(each, dict | list) else each[:30],
)
def test_what_doesn_t_fit_together_is_refused(targets: list[Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _job(*targets, **keys)


@pytest.mark.parametrize(
    ("targets", "keys", "message", "remedy"),
    [
        ([{"pattern": "2:4", "params": ["*.mlpp.*"]}], {}, "entry 1, 2:4, fits no matrix", "layers"),
        ([NEURONS, {"pattern": "2:4", "params": ["*.down"]}], {}, "entry 2, 2:4, fits no matrix", "layers"),
        ([{**HEADS, "sparsity": 0.3}], {}, "prune none of 2 heads with sparsity 0.3", "from 0.5 to 0.5"),
        ([{**HEADS, "sparsity": 0.9999999}], {}, "prune all of 2 heads", "from 0.5 to 0.5"),
        ([HEADS], {"model": {"num_key_value_heads": 1}}, "prune none of 1 heads", "a single one must stay"),
        ([{"pattern": "2:4", "params": ["*.output"]}, HEADS], {}, "has a part of them, .*output", "Put it first"),
        (
            [{"pattern": "2:4", "params": ["*.experts.0.*"]}],
            {},
            r"picks some of the experts' layers.1.mlp.experts.\*.gate_up",
            "Name all of them",
        ),
        (
            [{"pattern": "2:4"}],
            {"model": {"moe_intermediate_size": 30}},
            r"multiple of 4 weights, and layers.1.mlp.experts.0.down has shape \(128, 30\)",
            "other sizes",
        ),
        (
            [NEURONS],
            {"trainable": ["*.attention.*"]},
            "leaves as they are, layers.0.mlp.gate_up, layers.0.mlp.down",
            "Train them",
        ),
    ],
    ids=lambda each: None if isinstance(each, dict | list) else each[:30],
)
def test_what_the_models_parameters_don_t_allow_is_refused(
    targets: list[Any], keys: dict[str, Any], message: str, remedy: str
) -> None:
    job = _job(*targets, **keys)
    params, buffers = listed(job.model, 64)
    with pytest.raises(UsageError, match=message) as refused:
        inventory(params, job, buffers)
    assert remedy in refused.value.remedy
