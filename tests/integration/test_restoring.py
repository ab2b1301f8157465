"""Real workers that begin from a checkpoint of another world: the same bits, the same steps after it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.protocol.messages import Restore
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.job import JobSpec
from tests.support.texts import small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of

pytestmark = pytest.mark.usefixtures("device")

Records = dict[int, StepRecord]
SAVED = 14  # the step after which training stops


def _train(worker_group: LocalWorkerGroup, restore: Restore | None = None) -> None:
    """All workers, from the beginning or a checkpoint, to the end of the job."""
    worker_group.start(worker_group.plan(worker_group.ids, restore=restore))
    worker_group.await_finished()


def _job(texts: Path, compression: str = "none", **train: Any) -> JobSpec:
    communication = CommunicationSpec.model_validate({"compression": compression})
    return small_job(texts, **train).model_copy(update={"communication": communication})


def _saved(
    texts: Path, store_dir: Path, directory: Path, size: int, at: int = SAVED, **train: Any
) -> tuple[Restore, Records]:
    """A run of `size` workers that was never broken: a checkpoint from its middle, and all of its steps."""
    job = _job(texts, **train)
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": at + 1})})
    with LocalWorkerGroup(job, store_dir, directory, size=size) as worker_group:
        _train(worker_group)
        return Restore(at, str(commit_of(worker_group, at))), dict(worker_group.records)


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("bf16", 2)])
def test_state_is_read_bit_by_bit_at_any_world_size(
    texts: Path, store_dir: Path, tmp_path: Path, precision: str, zero_stage: int
) -> None:
    train = {"precision": precision, "zero_stage": zero_stage}
    restore, _ = _saved(texts, store_dir, tmp_path / "first", 3, **train)
    with LocalWorkerGroup(
        small_job(texts, max_steps=SAVED + 1, **train), store_dir, tmp_path / "second", size=2
    ) as worker_group:
        _train(worker_group, restore)  # nothing is left to do: it writes what it has read
        assert worker_group.records == {}
        again = commit_of(worker_group, SAVED)
    with CheckpointReader(Path(restore.path)) as old, CheckpointReader(again) as new:
        assert old.manifest.tensors.keys() == new.manifest.tensors.keys()
        for name, entry in old.manifest.tensors.items():
            np.testing.assert_array_equal(old.read(name, 0, entry.numel), new.read(name, 0, entry.numel))


@pytest.fixture(scope="module")
def compressed(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Restore:
    """A checkpoint of three workers that have compressed their gradients."""
    return _saved(texts, store_dir, tmp_path_factory.mktemp("compressed"), 3, compression="topk")[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_unsent_residuals_are_restored_at_any_world_size(
    texts: Path, store_dir: Path, tmp_path: Path, compressed: Restore, size: int
) -> None:
    job = _job(texts, "topk", max_steps=SAVED + 1)
    with LocalWorkerGroup(job, store_dir, tmp_path, size=size) as worker_group:
        _train(worker_group, compressed)  # nothing is left to do: it writes what it has read
        again = commit_of(worker_group, SAVED)
    with CheckpointReader(Path(compressed.path)) as old, CheckpointReader(again) as new:
        names = {name.partition("#")[0] for name in old.manifest.tensors if name.startswith("residual/")}
        assert names and not any("norm" in name or "router" in name or "experts." in name for name in names)
        for name in names:
            before, after = _parts(old, name, 3), _parts(new, name, size)
            assert np.abs(before).sum() > 0
            np.testing.assert_allclose(after.sum(0), before.sum(0), rtol=0, atol=1e-6 * np.abs(before).max())
            if size == 3:
                np.testing.assert_array_equal(after, before)


def _parts(reader: CheckpointReader, name: str, size: int) -> Any:
    numel = reader.manifest.tensors[f"{name}#0"].numel
    return np.stack([reader.read(f"{name}#{rank}", 0, numel) for rank in range(size)])


@pytest.mark.long_emulated
def test_training_continues_with_the_bits_of_an_uninterrupted_run(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    at, train = 57, {"max_steps": 158, "determinism": "exact"}  # 100 steps after the break
    restore, unbroken = _saved(texts, store_dir, tmp_path / "first", 1, at, **train)
    with LocalWorkerGroup(small_job(texts, **train), store_dir, tmp_path / "second", size=2) as worker_group:
        _train(worker_group, restore)
        records = dict(worker_group.records)
    assert sorted(records) == list(range(at + 1, at + 101))
    for step, record in records.items():
        assert (record.loss, record.update.grad_norm) == (unbroken[step].loss, unbroken[step].update.grad_norm)
        assert record.update.lr == unbroken[step].update.lr
        assert record.batch.first_position == unbroken[step].batch.first_position


@pytest.fixture(scope="module")
def alone(texts: Path, store_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Restore:
    """A checkpoint of one worker."""
    return _saved(texts, store_dir, tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        pytest.param({"seed": 7}, "sample order", id="another order of samples"),
        pytest.param({"model": {"num_hidden_layers": 3}}, "of another model", id="another model"),
    ],
)
def test_what_does_not_belong_to_the_job_is_refused(
    texts: Path, store_dir: Path, tmp_path: Path, alone: Restore, changes: dict[str, Any], rule: str
) -> None:
    with LocalWorkerGroup(small_job(texts, **changes), store_dir, tmp_path, size=1) as worker_group:
        worker_group.send(next=worker_group.plan(worker_group.ids, restore=alone))
        worker_group.await_all(worker_group.ids, lambda r: r.phase is Phase.FAILED)
        error = worker_group.members["w0"].report().health.error
        assert error is not None and rule in error.message
