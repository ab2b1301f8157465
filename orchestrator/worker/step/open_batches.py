"""The reader of a run's data."""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from orchestrator.checkpoint.hf.teacher import check_teacher
from orchestrator.data.bucket_store import open_store
from orchestrator.data.logit_store import LogitStore
from orchestrator.data.rows.bucket_rows import open_rows
from orchestrator.errors import OrchestratorError
from orchestrator.model.task import Task
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location, is_there, location_of
from orchestrator.storage.condition import StorageTrouble, refusal
from orchestrator.worker.step.batches import BatchReader
from orchestrator.worker.step.row_batches import RowBatches
from orchestrator.worker.step.token_batches import TokenBatches

log = logging.getLogger("orchestrator.worker")

R = TypeVar("R")

AGAIN_S = 2.0  # until data that can't be read are tried again
ABSENT = (OrchestratorError, FileNotFoundError, NotADirectoryError)  # errors of data that aren't there


def open_when_there(
    open_data: Callable[[], R], run_dir: Location, refused: Callable[[StorageTrouble | None], None]
) -> R:
    """What `open_data` returns, as soon as run storage gives what it reads: it is no failure of a worker if that can't
    be read, or isn't mounted.

    Args:
        run_dir: the run's, which is there if its storage is.
        refused: called with the reason while storage gives nothing; with None once it does.
    """
    shown = ""
    while True:
        try:
            found = open_data()
        except (OSError, OrchestratorError) as error:
            trouble = _trouble_of(error, run_dir)
            if trouble is None:
                raise
            if trouble.why != shown:
                log.warning("%s; tried again until they can", trouble.why)
                refused(trouble)
            shown = trouble.why
            time.sleep(AGAIN_S)
        else:
            if shown:
                refused(None)
            return found


def _trouble_of(error: OSError | OrchestratorError, run_dir: Location) -> StorageTrouble | None:
    """The trouble of storage that an error shows; None if it is one of the data."""
    what = "the run's data can't be read"
    try:
        if isinstance(error, ABSENT) and is_there(run_dir):
            return None
    except OSError as unreadable:
        return refusal(what, unreadable)
    if isinstance(error, OSError) and not isinstance(error, ABSENT):
        return refusal(what, error)
    return refusal(what, OSError(errno.ENODEV, "the run is not there: perhaps its file system is not mounted"))


def open_batches(job: JobSpec, store_dir: str, task: Task, device: torch.device) -> BatchReader:
    """The reader of the store that was prepared for a job. Raises DataError, StoreCorrupt, OSError; and UsageError
    if predictions of a teacher that come with it have changed."""
    place = location_of(store_dir)
    if job.has_rows:
        return RowBatches(job, open_rows(place), task, device)
    store = open_store(place)
    if job.distill is None or job.distill.logits is None:
        return TokenBatches(job, store, device)
    check_teacher(job.distill)
    return TokenBatches(job, store, device, LogitStore.open(Path(job.distill.logits)))
