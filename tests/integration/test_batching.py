"""Rows of unequal length and micro-batches that are measured, in real worker processes."""

from pathlib import Path

import pytest
import torch

from orchestrator.protocol.worker_report import MicroBatchMemory
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.sampling.sample_ledger import audit
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.memory_probe import room
from tests.support.texts import STEPS, prepare_texts, small_job
from tests.support.worker_group import LocalWorkerGroup

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Texts of many lengths, and their store."""
    texts = tmp_path_factory.mktemp("uneven")
    for number in range(200):
        words = " ".join(f"word{number * i % 97}" for i in range(2 + number % 40))
        (texts / f"{number}.txt").write_text(words)
    return texts, prepare_texts(texts, tmp_path_factory.mktemp("store"))


def _by_document(texts: Path, **train: object) -> JobSpec:
    # Tokens visit all experts: else rounding decides after some steps which of two equally good ones they get.
    sizes = {"micro_batch_size": "400 tokens", "sequence_length": 100, "global_batch_size": 24}
    job = small_job(texts, {"num_experts_per_tok": 6}, **sizes, **train)
    return job.model_copy(update={"data": job.data.model_copy(update={"row_format": "documents"})})


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_rows_by_document_train_the_same_in_any_worlds_and_through_a_loss(
    uneven: tuple[Path, Path], tmp_path: Path, zero_stage: int
) -> None:
    texts, store_dir = uneven
    job = _by_document(texts, zero_stage=zero_stage)
    with LocalWorkerGroup(job, store_dir, tmp_path / "alone", size=1) as alone:
        alone.start(alone.plan(alone.ids))
        alone.await_finished()
    with LocalWorkerGroup(job, store_dir, tmp_path / "moved", size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[:2]))
        worker_group.await_step(4)
        worker_group.rescale(worker_group.ids[:3])
        worker_group.await_step(worker_group.newest_step + 4)
        worker_group.members["w2"].kill()
        worker_group.recover(worker_group.ids[:2], micro_batch=MicroBatchSize(tokens=200, multiple=2))
        worker_group.await_finished()
    records = [worker_group.records[step] for step in range(STEPS)]
    assert audit((r.step, r.batch.first_position, r.batch.num_positions) for r in records).ok
    assert {r.world_size for r in records} == {2, 3}
    for record in records:
        wanted = alone.records[record.step]
        assert record.loss == pytest.approx(wanted.loss, rel=1e-5) and record.batch.tokens == wanted.batch.tokens
        if wanted.validation_loss is not None:
            assert record.validation_loss == pytest.approx(wanted.validation_loss, rel=1e-5)
    assert 0 < max(r.batch.padding for r in records) < 0.5
    assert min(r.batch.num_micro_batches for r in records if r.generation == worker_group.newest_generation) > max(
        r.batch.num_micro_batches for r in records if r.generation == 0
    )
    assert records[-1].loss < records[0].loss - 0.5


def test_workers_report_the_memory_of_their_micro_batches(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    job = small_job(texts, micro_batch_size="auto", global_batch_size=12, sequence_length=256, max_steps=400)
    with LocalWorkerGroup(job, store_dir, tmp_path, size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids, micro_batch=MicroBatchSize(tokens=256, multiple=2)))
        worker_group.await_step(6)
        one = _micro_batches(worker_group)
        plan = worker_group.rescale(worker_group.ids, micro_batch=MicroBatchSize(tokens=6 * 256, multiple=2))
        worker_group.await_step(worker_group.newest_step + 6)
        six = _micro_batches(worker_group)
        assert plan.generation == six.generation
    assert (one.generation, one.sequence_length, one.tokens, one.num_micro_batches) == (0, 256, 256, 12)
    assert (six.sequence_length, six.tokens, six.num_micro_batches) == (256, 6 * 256, 2)
    assert one.steps >= 6 and not one.is_gpu and one.place == room(CPU).place
    per_token = (six.kept_bytes - one.kept_bytes) / (5 * 256)
    assert 2 * 8 * 32 * 4 < per_token < 2 * 40 * 32 * 4  # some vectors in each of two layers
    assert 100e6 < one.resident_bytes <= six.resident_bytes < one.limit_bytes == room(CPU).limit_bytes
    assert one.resident_bytes < one.used_bytes < one.limit_bytes


def _micro_batches(worker_group: LocalWorkerGroup) -> MicroBatchMemory:
    found = worker_group.members["w0"].report().micro_batches
    assert found is not None
    return found
