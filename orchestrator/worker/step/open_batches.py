"""The reader of a run's data."""

import torch

from orchestrator.data.bucket_store import open_store
from orchestrator.data.rows.bucket_rows import open_rows
from orchestrator.model.task import Task
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.row_batches import RowBatches
from orchestrator.worker.step.token_batches import TokenBatches


def open_batches(job: JobSpec, store_dir: str, task: Task, device: torch.device) -> BatchReader:
    """The reader of the store that was prepared for a job. Raises DataError, StoreCorrupt, OSError."""
    place = location_of(store_dir)
    if job.has_rows:
        return RowBatches(job, open_rows(place), task, device)
    return TokenBatches(job, open_store(place), device)
