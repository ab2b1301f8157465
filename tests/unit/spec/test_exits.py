"""The section `model.exits`: what it takes, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.exits import DEFAULT_WEIGHT, ExitsSpec
from orchestrator.spec.job import JobSpec


def _job(exits: dict[str, Any], model: dict[str, Any] | None = None, **keys: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "leaving", "model": {"exits": exits, **(model or {})}, **keys})


def test_each_exit_has_a_weight() -> None:
    assert _job({"layers": [1, 3]}).model.exits == ExitsSpec(layers=(1, 3), loss_weights=(DEFAULT_WEIGHT,) * 2)
    assert _job({"layers": [2]}, task="sft", data={"source": "chats.jsonl"}).model.exits is not None


@pytest.mark.parametrize(
    ("exits", "model", "keys", "problem"),
    [
        ({"layers": [2, 4]}, {}, {}, "layers of exits must be less than num_hidden_layers.*got 4 and 4"),
        ({"layers": [9]}, {"num_hidden_layers": 8}, {}, "got 9 and 8"),
        ({"layers": [0, 2]}, {}, {}, r"layers must be at least 1 and ascend, each named once; got \[0, 2\]"),
        ({"layers": [3, 2]}, {}, {}, r"got \[3, 2\]"),
        ({"layers": [2, 2]}, {}, {}, r"got \[2, 2\]"),
        ({"layers": []}, {}, {}, "at least 1 item"),
        ({"layers": [1, 2], "loss_weights": [0.1]}, {}, {}, "as many entries as layers; got 1 and 2"),
        ({"layers": [1], "loss_weights": [0.0]}, {}, {}, "loss_weights must be above 0"),
        ({"layers": [1]}, {"impl": "transformers", "init_from": "/m"}, {}, "exits must be null with a model of transf"),
        ({"layers": [1]}, {"entrypoint": "my:model"}, {}, "exits must be null with a model of my:model"),
        ({"layers": [1]}, {"router": {"selection": "expert_choice"}}, {}, "null with router.selection expert_choice"),
        ({"layers": [1]}, {}, {"task": "dpo", "data": {"source": "pairs.jsonl"}}, "exits need a task of next tokens"),
        ({"layers": [1]}, {}, {"task": {"entrypoint": "my:task"}}, "exits need a task of next tokens.*got my:task"),
    ],
)
def test_what_does_not_go_together_is_named(
    exits: dict[str, Any], model: dict[str, Any], keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValidationError, match=problem):
        _job(exits, model, **keys)
