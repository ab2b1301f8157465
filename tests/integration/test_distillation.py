"""Runs that learn from a teacher, by real workers: through rescales, a loss and a resume, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.hf.teacher import open_teacher, teacher_digest
from orchestrator.errors import UsageError
from orchestrator.protocol.messages import Restore
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec
from tests.support.pretrained import write_weights
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of, disturbed_and_undisturbed

pytestmark = pytest.mark.usefixtures("device")


def _job(texts: Path, teacher: Path, distill: dict[str, Any] | None = None, **train: Any) -> JobSpec:
    job = small_job(texts, {"vocab_size": VOCAB, "n_routed_experts": 3}, **train)
    keys = {"teacher": str(teacher), "teacher_sha256": teacher_digest(teacher), **(distill or {})}
    return job.model_copy(update={"distill": DistillSpec.model_validate(keys)})


def _teacher(texts: Path, directory: Path) -> Path:
    sizes = {"vocab_size": VOCAB, "partial_rotary_factor": 0.5, "num_hidden_layers": 3}
    return write_weights(directory, small_job(texts, sizes).model)


@pytest.mark.parametrize(
    ("distill", "train"),
    [
        pytest.param({"hidden_weight": 0.5}, {}, id="logits and hidden states", marks=pytest.mark.long_emulated),
        pytest.param({"alpha": 1.0}, {"precision": "bf16"}, id="bf16", marks=pytest.mark.long_emulated),
    ],
)
def test_a_student_moves_and_is_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, distill: dict[str, Any], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    job = _job(texts, _teacher(texts, tmp_path / "teacher"), distill, determinism="exact", **train)
    disturbed, undisturbed = disturbed_and_undisturbed(job, store_dir, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        assert disturbed.records[step].loss == record.loss and disturbed.records[step].metrics == record.metrics
    assert undisturbed.records[STEPS - 1].loss < undisturbed.records[0].loss
    validated = [record for record in undisturbed.records.values() if record.validation_loss is not None]
    shown = validated[-1].validation_metrics["cross_entropy"]
    assert abs(validated[-1].validation_loss - shown) < 1e-5  # of the task alone, whatever alpha is


@pytest.mark.long_emulated
def test_a_checkpoint_of_another_run_teaches(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    """The student's divergence from it falls, and a resumed run goes on with the same bits."""
    elder = small_job(texts, {"vocab_size": VOCAB}, lr=1e-2)
    elder = elder.model_copy(update={"checkpoint": elder.checkpoint.model_copy(update={"every": 10})})
    with LocalWorkerGroup(elder, store_dir, tmp_path / "elder", size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    teacher = commit_of(worker_group, STEPS - 1)
    job_file = teacher.parent.parent / "job.json"
    job_file.write_text(elder.model_dump_json(by_alias=True))
    assert open_teacher(teacher).model == elder.model

    job = _job(texts, teacher, determinism="exact", lr=1e-2)
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": 10})})
    runs: list[LocalWorkerGroup] = []
    restore = None
    for size in (3, 1):
        with LocalWorkerGroup(job, store_dir, tmp_path / str(size), size=size) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids, restore=restore))
            worker_group.await_finished()
        runs.append(worker_group)
        restore = restore or Restore(9, str(commit_of(worker_group, 9)))
    whole, resumed = (worker_group.records for worker_group in runs)
    assert sorted(resumed) == list(range(10, STEPS))
    assert all(whole[step].loss == record.loss for step, record in resumed.items())
    assert whole[STEPS - 1].metrics["teacher_divergence"] < 0.5 * whole[0].metrics["teacher_divergence"]

    job_file.write_text("{}")
    with pytest.raises(UsageError, match="is a checkpoint, and the job of its run, .*job.json, can't be read"):
        open_teacher(teacher)
