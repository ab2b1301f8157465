"""A job's teacher at submission and at a resume: what is found out, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.hf.teacher import check_teacher
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError, OrchestratorError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.submission.submission import resolved
from tests.support.pretrained import VOCAB, write_directory


def _job(tmp_path: Path, distill: dict[str, Any] | None = None, **sections: Any) -> JobSpec:
    keys = {"teacher": str(tmp_path / "teacher"), **(distill or {})}
    return JobSpec.model_validate({"name": "try", "distill": keys, **sections})


def test_the_job_gets_digest_size_vocabulary_and_tokenizer(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "teacher")
    job = resolved(_job(tmp_path))
    assert job.distill is not None and job.distill.teacher == str(directory)
    assert len(job.distill.teacher_sha256) == 64 and job.distill.teacher_parameters > 10_000
    assert job.model.vocab_size == VOCAB and job.data.tokenizer == str(directory / "tokenizer.json")
    assert resolved(job) == job
    check_teacher(job.distill)


def test_a_tokenizer_may_be_named_if_it_is_the_same(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "teacher")
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    mine.write_bytes((directory / "tokenizer.json").read_bytes())
    assert resolved(_job(tmp_path, data={"tokenizer": str(mine)})).data.tokenizer == str(mine)
    TextTokenizer.train(["another text, of which other tokens are made"], 280).save(other)
    with pytest.raises(UsageError, match="the tokenizers of teacher and student differ: .*/teacher/tokenizer.json and"):
        resolved(_job(tmp_path, data={"tokenizer": str(other)}))


@pytest.mark.parametrize(
    ("distill", "sections", "reason"),
    [
        ({"teacher": "nowhere"}, {}, "distill.teacher: [^:]*/nowhere/config.json can't be read"),
        ({}, {"model": {"vocab_size": 512}}, "a vocabulary of 300 tokens, and the student one of 512"),
        ({"hidden_weight": 1.0}, {"model": {"hidden_size": 32, "num_attention_heads": 2}}, "differ in size: 32 .* 16"),
        (
            {"teacher_sha256": "0" * 64},
            {},
            "has changed: its SHA-256 is .*, and that of the weights of the teacher that the run learns from",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distill: dict[str, Any], sections: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_directory(tmp_path / "teacher")
    with pytest.raises(UsageError, match=reason) as raised:
        resolved(_job(tmp_path, distill, **sections))
    assert raised.value.remedy and raised.value.unchanged


def test_a_teacher_without_a_tokenizer_needs_one_to_be_named(tmp_path: Path) -> None:
    tokenizer = write_directory(tmp_path / "teacher") / "tokenizer.json"
    mine = tokenizer.rename(tmp_path / "mine.json")
    with pytest.raises(UsageError, match="has no tokenizer.json, which would turn data.source into its tokens"):
        resolved(_job(tmp_path))
    assert resolved(_job(tmp_path, data={"tokenizer": str(mine)})).data.tokenizer == str(mine)


def test_a_directory_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    store = tmp_path / "store-1"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="store-1 is no model: its manifest.json is not that of a checkpoint") as error:
        resolved(_job(tmp_path, {"teacher": str(store)}))
    assert "distill.logits" in error.value.remedy
    with pytest.raises(DataError, match="store-1 has no predictions of a teacher: its manifest.json is of something"):
        resolved(_job(tmp_path, {"teacher": None, "logits": str(store)}))
    (store / "manifest.json").unlink()
    with pytest.raises(DataError, match="it holds no manifest.json"):
        resolved(_job(tmp_path, {"teacher": None, "logits": str(store)}))
    (store / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UsageError, match="distill.teacher: .*/store-1/config.json") as error:
        resolved(_job(tmp_path, {"teacher": str(store)}))
    assert "a checkpoint of a run" in error.value.remedy


def test_a_directory_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    (write_directory(tmp_path / "teacher") / "model.safetensors").unlink()
    with pytest.raises(OrchestratorError, match="holds neither model.safetensors nor"):
        resolved(_job(tmp_path))


def test_a_run_goes_on_with_the_same_teacher_alone(tmp_path: Path) -> None:
    job = resolved(_job(tmp_path, {"teacher": str(write_directory(tmp_path / "teacher"))}))
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="has changed: its SHA-256 is "):
        check_teacher(job.distill)
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="doesn't exist, and had the weights of the teacher that the run learns from"):
        check_teacher(job.distill)
    check_teacher(None)
