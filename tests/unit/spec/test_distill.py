"""The `distill` section: what is refused, with the keys to change."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec


def _job(distill: dict[str, Any], **sections: Any) -> JobSpec:
    given = {"teacher": "/teacher", **distill} if "logits" not in distill else distill
    return JobSpec.model_validate({"name": "try", "distill": given, **sections})


def test_a_job_with_a_teacher_keeps_its_keys() -> None:
    job = _job({"alpha": 0.3})
    assert job.distill is not None and (job.distill.alpha, job.distill.temperature) == (0.3, 2.0)
    assert JobSpec.model_validate_json(job.model_dump_json(by_alias=True)) == job


@pytest.mark.parametrize(
    ("distill", "sections", "rule"),
    [
        ({"alpha": 0.0}, {}, "greater than 0"),
        ({"alpha": 1.5}, {}, "less than or equal to 1"),
        ({"temperature": 0}, {}, "greater than 0"),
        ({"hidden_weight": -1}, {}, "greater than or equal to 0"),
        ({"teacher": "s3://bucket/model"}, {}, "must be a path of the file system"),
        ({}, {"task": "dpo"}, "distill needs a task of next tokens, lm or sft; got dpo"),
        ({}, {"task": {"entrypoint": "my:task"}}, "distill needs a task of next tokens, lm or sft; got my:task"),
        ({"teacher": None}, {}, "distill needs a teacher, or its logits, and not both; got none"),
        ({"logits": "/logits", "teacher": "/teacher"}, {}, "not both; got both"),
        ({"logits": "/logits", "hidden_weight": 0.5}, {}, "hidden_weight must be 0 with logits, .*; got 0.5"),
        ({"logits": "/logits"}, {"task": "sft"}, "can't be used with sft: name a teacher"),
        ({"logits": "/logits"}, {"data": {"row_format": "documents"}}, "with other rows than packed ones"),
        (
            {"logits": "/logits"},
            {"curriculum": {"signal": "length", "stages": [{"name": "all"}]}},
            "can't be used with a curriculum",
        ),
        (
            {"hidden_weight": 0.5},
            {"model": {"entrypoint": "my:model"}},
            "hidden_weight must be 0 with a model that returns logits alone; got 0.5",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(distill: dict[str, Any], sections: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        _job(distill, **sections)
