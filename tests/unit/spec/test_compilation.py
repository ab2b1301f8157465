"""The key `train.torch_compile`: what is refused with it."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec

EXACT = {"determinism": "exact"}


def _job(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **others: Any) -> JobSpec:
    keys = {"name": "compiled", "model": model or {}, "train": {"torch_compile": True, **(train or {})}}
    return JobSpec.model_validate(keys | others)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"impl": "transformers", "init_from": "/m"}}, "torch_compile must be false with a model of"),
        ({"model": {"init_from": "/m", "lora": {}}}, "torch_compile must be false with adapters"),
        ({"train": {"trainable": ["head"]}}, "where some parameters aren't trained.*got trainable head"),
        ({"train": {"float8": True}}, "torch_compile must be false with float8"),
        ({"train": {"quantization": {}}}, "torch_compile must be false with quantization"),
        (
            {"train": EXACT | {"micro_batch_size": "64 tokens"}},
            "micro_batch_size must be a number of rows with.*got 64 tokens",
        ),
        ({"train": EXACT, "data": {"row_format": "documents"}}, "rows must be of equal length with torch_compile"),
        (
            {
                "train": EXACT,
                "curriculum": {"stages": [{"name": "a", "until": {"steps": 9}, "sequence_length": 9}, {"name": "b"}]},
            },
            "stages must have no other sequence_length",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        _job(**changes)


def test_shapes_may_vary_where_bits_do_not_matter() -> None:
    job = _job(train={"micro_batch_size": "64 tokens"}, data={"row_format": "documents"})
    assert job.train.torch_compile and _job(train=EXACT).train.is_exact
