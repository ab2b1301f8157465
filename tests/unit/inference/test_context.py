"""The context of a run's model: how long a prompt may be."""

import json
from pathlib import Path
from typing import Any

from orchestrator.inference.generate import known_context, trained_length
from orchestrator.spec.job import JobSpec


def _job(model: dict[str, Any], **keys: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "reads", "model": model, "train": {"sequence_length": 64}, **keys})


def test_a_new_model_knows_the_longest_row_of_its_training() -> None:
    assert known_context(_job({})) == trained_length(_job({})) == 64
    stages = [{"name": "short", "sequence_length": 16, "until": {"steps": 5}}, {"name": "long", "sequence_length": 256}]
    assert known_context(_job({}, curriculum={"stages": stages})) == 256


def test_a_model_that_began_from_another_has_its_context(tmp_path: Path) -> None:
    job = _job({"init_from": str(tmp_path)})
    assert known_context(job) is None  # the directory tells nothing any more
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    assert known_context(job) == 2048
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))
    assert known_context(job) == 64


def test_models_of_others_have_one_where_they_tell_it() -> None:
    assert known_context(_job({"impl": "transformers", "config": {"model_type": "x", "n_positions": 128}})) == 128
    assert known_context(_job({"impl": "transformers", "config": {"model_type": "x"}})) is None
    assert known_context(_job({"entrypoint": "my:model"})) is None
