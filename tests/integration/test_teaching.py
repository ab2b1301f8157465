"""`data teach`: a teacher's predictions for a token store, and a run that learns from them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.hf.teacher import teacher_digest
from orchestrator.data.logit_store import LogitStore
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, DataNotWritten, OrchestratorError, StoreCorrupt, UsageError
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.submission import teaching
from orchestrator.submission.submission import resolved
from orchestrator.submission.teaching import TeachRequest, plan_teaching, teach
from orchestrator.worker.whole_models.whole_model import teacher_model
from tests.support.own_models import linear, own_spec
from tests.support.pretrained import write_weights
from tests.support.texts import STEPS, VOCAB, prepare_texts, small_job
from tests.support.worker_group import LocalWorkerGroup, disturbed_and_undisturbed

LENGTH = 32  # of small_job


@pytest.fixture
def request_of(texts: Path, store_dir: Path, tmp_path: Path) -> TeachRequest:
    sizes = {"vocab_size": VOCAB, "partial_rotary_factor": 0.5}
    teacher = write_weights(tmp_path / "teacher", small_job(texts, sizes).model)
    (teacher / "tokenizer.json").write_bytes((store_dir / "tokenizer.json").read_bytes())
    return TeachRequest(store_dir, teacher, tmp_path / "logits", LENGTH, False, 8, 2.0)


def _teach(request: TeachRequest, spread: teaching.Spread = map) -> LogitStore:
    return teach(plan_teaching(request), spread, lambda stage, share: None)


def _none(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
    raise AssertionError(f"{len(tasks)} tasks, where none are left")


def test_predictions_are_those_of_the_teacher(request_of: TeachRequest) -> None:
    logits, store = _teach(request_of), TokenStore.open(request_of.store)
    assert plan_teaching(request_of).is_done and _teach(request_of, _none).directory == logits.directory
    assert logits.manifest.num_rows == {s: store.num_rows(s, LENGTH) for s in ("train", "validation")}  # type: ignore[arg-type]
    model = teacher_model(DistillSpec(teacher=str(request_of.teacher)), VOCAB, TrainSpec(), torch.device("cpu"))
    rows_R = np.array([3, 0, store.num_rows("train", LENGTH) - 1])
    with torch.no_grad():
        logits_RTV = model(torch.from_numpy(store.rows("train", rows_R, LENGTH).inputs_RT))
    log_RTV = (logits_RTV / 2.0).log_softmax(-1)
    arrays = {name: torch.from_numpy(array) for name, array in logits.rows("train", rows_R).items()}
    logs_RTK, ids_RTK = log_RTV.topk(8, dim=-1)
    torch.testing.assert_close(log_RTV.gather(-1, arrays["teacher_ids"]), logs_RTK, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(arrays["teacher_logs"], logs_RTK, rtol=2e-3, atol=1e-3)
    rest_RT = (1.0 - ids_RTK.new_zeros(()).float() - logs_RTK.exp().sum(-1)).log()
    torch.testing.assert_close(arrays["teacher_rest"], rest_RT, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="rows of train"):
        logits.rows("train", np.array([10**6]))


def test_what_was_ended_goes_on(request_of: TeachRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "BLOCK_TOKENS", 100 * LENGTH)
    done: list[str] = []

    def ended(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        for task in tasks[:3]:
            done.append(task)
            yield function(task)
        raise KeyboardInterrupt

    def counted(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        assert not set(tasks) & set(done) and len(tasks) > 3
        return map(function, tasks)

    with pytest.raises(KeyboardInterrupt):
        _teach(request_of, ended)
    logits = _teach(request_of, counted)
    whole = _teach(TeachRequest(**{**vars(request_of), "out": request_of.out / "again"}))
    assert logits.manifest == whole.manifest and not list(request_of.out.glob(".*"))
    LogitStore.open(logits.directory, verify=True)


def test_finished_blocks_outlive_an_end_just_before_the_result_is_published(
    request_of: TeachRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "digest_file", _no_room)
    with pytest.raises(DataNotWritten, match="can't be written to .*: .*no room") as error:
        _teach(request_of)
    monkeypatch.undo()
    assert "--out" in error.value.remedy and "what is done is kept" in error.value.unchanged
    logits = _teach(request_of, lambda function, tasks: _none(function, tasks) if tasks else ())
    LogitStore.open(logits.directory, verify=True)


def _no_room(path: Path) -> None:
    raise OSError(28, f"no room for {path.name}")


def test_files_that_are_gone_are_computed_again(request_of: TeachRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "digest_file", _no_room)
    with pytest.raises(DataNotWritten):
        _teach(request_of)
    monkeypatch.undo()
    (lost,) = request_of.out.glob(".*/files/train.logs")
    lost.unlink()
    logits = _teach(request_of)
    assert float(logits.arrays["train", "logs"][-1].max()) < 0.0  # type: ignore[arg-type]
    LogitStore.open(logits.directory, verify=True)


def test_a_second_command_is_refused_while_the_first_one_computes(request_of: TeachRequest) -> None:
    def interrupted(function: Callable[[str], str], tasks: Sequence[str]) -> Iterable[str]:
        with pytest.raises(DataError, match="another process prepares .*/logits-"):
            _teach(request_of)
        return map(function, tasks)

    assert _teach(request_of, interrupted).manifest.num_rows["train"] > 0


def test_damaged_predictions_are_refused_before_training(request_of: TeachRequest) -> None:
    logits = _teach(request_of)
    with (logits.directory / "train.ids").open("r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(StoreCorrupt, match="train.ids has sha256") as error:
        LogitStore.open(logits.directory, verify=True)
    assert "orchestrator data teach" in error.value.remedy


def _job(request: TeachRequest, logits: Path, **sections: Any) -> JobSpec:
    job = small_job(request.store, {"n_routed_experts": 3}, determinism="exact")
    given = job.model_dump(by_alias=True, exclude_unset=True) | {"distill": {"logits": str(logits), "alpha": 0.9}}
    given["data"] = {"source": str(request.store)}
    for name, keys in sections.items():
        given[name] = given.get(name, {}) | keys
    return JobSpec.model_validate(given)


def test_a_run_learns_from_predictions_bit_by_bit(request_of: TeachRequest, tmp_path: Path) -> None:
    logits = _teach(request_of)
    job = resolved(_job(request_of, logits.directory))
    assert job.distill is not None and job.distill.teacher_sha256 == teacher_digest(logits.directory)
    assert job.model.vocab_size == VOCAB
    disturbed, undisturbed = disturbed_and_undisturbed(job, request_of.store, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        assert disturbed.records[step].loss == record.loss and disturbed.records[step].metrics == record.metrics
    validated = [r.validation_metrics for r in undisturbed.records.values() if r.validation_loss is not None]
    assert all(metrics["teacher_divergence"] > 0 for metrics in validated)

    with logits.directory.joinpath("manifest.json").open("a") as file:
        file.write(" ")
    group = LocalWorkerGroup(job, request_of.store, tmp_path / "changed", size=1)
    with pytest.raises(Exception, match="has changed: its SHA-256 is .*, and that of the predictions"), group:
        group.start(group.plan(group.ids))


def test_a_model_of_ones_own_learns_from_predictions(request_of: TeachRequest, tmp_path: Path) -> None:
    """Its dry run, before training, is of rows without predictions."""
    job = resolved(_job(request_of, _teach(request_of).directory))
    own = own_spec(tmp_path, linear(), vocab_size=VOCAB)
    job = job.model_copy(update={"model": own})
    with LocalWorkerGroup(job, request_of.store, tmp_path / "own", size=2) as group:
        group.start(group.plan(group.ids))
        group.await_finished()
    first, last = (group.records[step].metrics["teacher_divergence"] for step in (0, STEPS - 1))
    assert len(group.records) == STEPS and last < first


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        ({"train": {"sequence_length": 64}}, "train.sequence_length is 64, there it is 32"),
        ({"data": {"isolate_documents": True}}, "data.isolate_documents is True, there it is False"),
        ({"distill": {"temperature": 1.0}}, "distill.temperature is 1.0, there it is 2.0"),
        (
            {"model": {"vocab_size": 512}},
            "distill.logits .* has a vocabulary of 300 tokens, and the student one of 512",
        ),
    ],
)
def test_predictions_for_other_rows_are_refused(request_of: TeachRequest, sections: dict[str, Any], rule: str) -> None:
    logits = _teach(request_of)
    with pytest.raises(UsageError, match=rule):
        resolved(_job(request_of, logits.directory, **sections))


def test_predictions_for_another_store_are_refused(request_of: TeachRequest, texts: Path, tmp_path: Path) -> None:
    """At submission where the data are a store, else once they are prepared."""
    logits = _teach(request_of)
    with pytest.raises(DataError, match="has predictions for another token store, "):
        logits.check("0" * 64)
    less = tmp_path / "less"
    less.mkdir()
    for path in sorted(texts.glob("*.txt"))[:5]:
        (less / path.name).write_bytes(path.read_bytes())
    other = prepare_texts(less, tmp_path / "other")
    with pytest.raises(UsageError, match="the digest of data.source is "):
        resolved(_job(request_of, logits.directory, data={"source": str(other)}))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"top_k": 300}, "--top-k is 300, and the vocabulary has 300 tokens"),
        ({"sequence_length": 10**8}, "no row of 100000000"),
        ({"store": Path("/nowhere")}, "is no token store"),
        ({"teacher": Path("/nowhere")}, "/nowhere/config.json can't be read"),
    ],
)
def test_what_can_not_be_taught_is_refused(request_of: TeachRequest, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(OrchestratorError, match=reason):
        plan_teaching(TeachRequest(**{**vars(request_of), **keys}))
    assert not request_of.out.exists()
