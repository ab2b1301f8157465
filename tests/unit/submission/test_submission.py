"""A job that begins with another's model stands for itself once it is an order."""

import json
from pathlib import Path

import pytest

from orchestrator.errors import DataError, OrchestratorError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.submission.submission import order_of
from tests.support.pretrained import SPEC, VOCAB, write_directory


def _job(directory: Path, model: str = "{init_from: hf}", data: str = "{}") -> str:
    (directory / "job.yaml").write_text(f"{{schema: v1, name: try, model: {model}, data: {data}}}")
    return "job.yaml"


def test_the_order_holds_sizes_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_directory(tmp_path / "hf")
    for name in (None, "other"):  # another name reads the job anew
        order = order_of(_job(tmp_path, "{init_from: hf, num_experts_per_tok: 2}"), name)
        job = JobSpec.model_validate_json(order.job_json)
        assert job == order.spec
        assert job.model == SPEC.model_copy(update={"init_from": str(directory), "embedding_scale": 1.0})
        assert job.data.tokenizer == str(directory / "tokenizer.json")


def test_another_tokenizer_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_directory(tmp_path / "hf")
    (directory / "tokenizer.json").rename(tmp_path / "mine.json")
    with pytest.raises(DataError, match="hf/tokenizer.json can't be read"):
        order_of(_job(tmp_path), None)
    job = order_of(_job(tmp_path, data="{tokenizer: mine.json}"), None).spec
    assert job.data.tokenizer == str(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ("{init_from: nowhere}", "^model.init_from: [^:]*/nowhere/config.json can't be read: "),
        ("{init_from: hf, num_hidden_layers: 7}", "model.num_hidden_layers is 7 and 2"),
        ("{init_from: hf, scoring_func: softmax}", "softmax"),
    ],
)
def test_a_job_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, rule: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_directory(tmp_path / "hf")
    with pytest.raises(UsageError, match=rule):
        order_of(_job(tmp_path, model), None)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = write_directory(tmp_path / "hf")
    saved = json.loads((directory / "tokenizer.json").read_text())
    first = saved["added_tokens"][0]
    saved["added_tokens"] += [first | {"id": 280 + n, "content": f"<|more {n}|>"} for n in range(60)]
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(OrchestratorError, match=f"has rows for {VOCAB} only"):
        order_of(_job(tmp_path), None)
