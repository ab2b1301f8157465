"""Runs to which nothing happens, to compare runs of a cluster with: one worker in a process of its own, without Ray."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.fault_tolerance import CheckpointSpec, ProtectionSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.submission.model_process import data_of
from tests.support.worker_group import LocalWorkerGroup, commit_of

PATIENCE_S = 250.0


@dataclass(frozen=True)
class CalmRun:
    """Its steps in order, and its checkpoint after the last one."""

    records: list[StepRecord]
    checkpoint: Path


def calm_run(job: JobSpec, status: RunStatus, run_dir: Path, store_dir: Path | None = None) -> CalmRun:
    """The job of a run that has ended, trained in `run_dir` by one worker for as many steps as the run has done.

    Args:
        store_dir: the prepared data, if not where the run has them.
    """
    store_dir = store_dir or Path(data_of(status.run_id, Path(status.run_dir)).store_dir)
    train = job.train.model_copy(update={"max_steps": status.step})
    sections = {"train": train, "checkpoint": CheckpointSpec(every=status.step), "protection": ProtectionSpec()}
    with LocalWorkerGroup(job.model_copy(update=sections), store_dir, run_dir, size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished(PATIENCE_S)
    assert sorted(worker_group.records) == list(range(status.step))
    records = [record for _, record in sorted(worker_group.records.items())]
    return CalmRun(records, commit_of(worker_group, status.step - 1))


def tensors_of(checkpoint: str | Path | None) -> dict[str, bytes]:
    """All tensors of a checkpoint that is whole, as bytes."""
    with CheckpointReader(location_of(str(checkpoint))) as reader:
        reader.verify()
        return {name: reader.read(name, 0, t.numel).tobytes() for name, t in reader.manifest.tensors.items()}


def assert_same_tensors(run: RunStatus, calm: CalmRun) -> None:
    """Compare all tensors of their last checkpoints, bit by bit."""
    ours, theirs = tensors_of(run.checkpoint), tensors_of(calm.checkpoint)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
