"""The `task` section, and rules between it, the data and the model."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.spec.job import JobSpec

OWN_MODEL = {"entrypoint": "mine:build"}


def _job(**sections: Any) -> JobSpec:
    return JobSpec.model_validate({"schema": "v1", "name": "try", **sections})


def _own(data_format: str, **data: Any) -> dict[str, Any]:
    return {"task": {"entrypoint": "mine:task"}, "data": {"source": "here", "format": data_format, **data}}


@pytest.mark.parametrize(
    ("sections", "has_rows", "has_chats", "has_tokens", "unit"),
    [
        ({}, False, False, True, "tokens"),
        ({"task": "sft", "data": {"source": "here"}}, True, True, True, "tokens"),
        ({"task": {"name": "dpo", "beta": 0.2}, "data": {"source": "here"}}, True, True, True, "pairs"),
        ({"task": "classification", "model": OWN_MODEL, "data": {"source": "here"}}, True, False, False, "rows"),
        ({"task": {"entrypoint": "mine:task"}}, False, False, True, "units"),
        ({"task": {"entrypoint": "mine:task"}, "data": {"entrypoint": "mine:rows"}}, True, False, False, "units"),
        (_own("text"), False, False, True, "units"),
        (_own("messages"), True, True, True, "units"),
        (_own("preference"), True, True, True, "units"),
        (_own("arrays"), True, False, False, "units"),
    ],
)
def test_the_task_decides_what_the_data_are(
    sections: dict[str, Any], has_rows: bool, has_chats: bool, has_tokens: bool, unit: str
) -> None:
    job = _job(**sections)
    assert (job.has_rows, job.has_chats, job.has_tokens, job.task.unit) == (has_rows, has_chats, has_tokens, unit)
    again = JobSpec.model_validate_json(job.model_dump_json(by_alias=True))
    assert again == job


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown task": ({"task": "rlhf"}, "'lm', 'sft', 'dpo' or 'classification'"),
    "a key of another task": ({"task": {"name": "sft", "beta": 0.2}}, "only dpo reads beta; got 0.2 for sft"),
    "a name and an entrypoint": (
        {"task": {"name": "sft", "entrypoint": "mine:task"}},
        "entrypoint takes the place of a built-in task: leave name out",
    ),
    "rows that no task knows": ({"data": {"entrypoint": "mine:rows"}}, "rows of data.entrypoint need a task"),
    "classes without a model": ({"task": "classification"}, "needs a model of your own"),
    "rows and a source": (
        {"task": {"entrypoint": "mine:task"}, "data": {"entrypoint": "mine:rows", "source": "there"}},
        "entrypoint gives the rows instead of source",
    ),
    "documents of chats": ({"task": "sft", "data": {"row_format": "documents"}}, "data.row_format is of text"),
    "chats of no file": ({"task": "sft"}, "data.source must name a file or a folder with the rows of task sft"),
    "isolated chats": ({"task": "sft", "data": {"isolate_documents": True}}, "data.isolate_documents is of text"),
    "a curriculum of chats": (
        {"task": "sft", "curriculum": {"signal": "length", "stages": [{"name": "all"}]}},
        "a curriculum orders text, and the task has rows",
    ),
    "arrays by tokens": (
        {"task": "classification", "model": OWN_MODEL, "train": {"micro_batch_size": "512 tokens"}},
        "micro_batch_size must be a number of rows",
    ),
    "a directory without code": ({"data": {"code_dir": "there"}}, "code_dir has a meaning with entrypoint only"),
    "fewer outputs than classes": (
        {"task": {"name": "classification", "num_classes": 9}, "model": {**OWN_MODEL, "vocab_size": 5}},
        "vocab_size must be at least task.num_classes; got 5 and 9",
    ),
    "a holdout of one's own rows": (
        {"task": {"entrypoint": "mine:task"}, "data": {"entrypoint": "mine:rows", "holdout": 0.3}},
        "data.holdout is of files",
    ),
    "a template of text": ({"data": {"chat_template": "there"}}, "data.chat_template is of tasks sft and dpo"),
    "a template of arrays": (_own("arrays", chat_template="there"), "and of data.format messages and preference"),
    "another format than the task's": (
        {"task": "dpo", "data": {"source": "here", "format": "messages"}},
        "data.format is preference for task dpo, and need not be given; got messages",
    ),
    "a format of one's own rows": (
        {"task": {"entrypoint": "mine:task"}, "data": {"entrypoint": "mine:rows", "format": "arrays"}},
        "data.format is of files",
    ),
    "pairs of no file": (
        {"task": {"entrypoint": "mine:task"}, "data": {"format": "preference"}},
        "data.source must name a file or a folder with the rows of task mine:task",
    ),
    "documents of one's own task's chats": (_own("messages", row_format="documents"), "data.row_format is of text"),
    "no function": ({"task": {"entrypoint": "mine"}}, 'must be "package.module:function"'),
}


@pytest.mark.parametrize(("sections", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _job(**sections)


def test_the_last_matrix_has_as_many_rows_as_the_data_ask_for() -> None:
    text = _job(data={"vocab_size": 500})
    assert (text.num_outputs(), text.num_outputs(400)) == (500, 400)
    assert _job(model={"vocab_size": 600}).num_outputs(400) == 600
    classes = _job(task={"name": "classification", "num_classes": 7}, model=OWN_MODEL, data={"source": "here"})
    assert classes.num_outputs() == classes.num_outputs(5) == 7
