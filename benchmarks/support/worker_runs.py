"""Runs of the product's workers without Ray and controller, from their first step to their last."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.environment import environment, worker_environment
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.job import JobSpec
from tests.support.worker_group import LocalWorkerGroup, commit_of

PATIENCE_S = 4 * 3600.0


@dataclass(frozen=True)
class WorkerRun:
    """A run that has ended.

    Args:
        records: of all its steps, in order.
        checkpoint: directory of its last state.
    """

    records: tuple[StepRecord, ...]
    checkpoint: Path


@contextmanager
def finished_run(job: JobSpec, store_dir: Path, world_size: int) -> Iterator[WorkerRun]:
    """Train a job on workers of one thread each; its files are deleted afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="worker-run-") as folder,
        environment(worker_environment(threads=1, keep_memory=True)),
        LocalWorkerGroup(job, store_dir, Path(folder), size=world_size) as group,
    ):
        group.start(group.plan(group.ids))
        group.await_finished(patience_s=PATIENCE_S)
        last = job.train.max_steps - 1
        records = tuple(record for _, record in sorted(group.records.items()))
        if [record.step for record in records] != list(range(last + 1)):
            raise RuntimeError(f"there are records of {len(records)} steps, of {last + 1} that were trained")
        yield WorkerRun(records, commit_of(group, last))
