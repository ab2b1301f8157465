"""What a run that has ended still owes MLflow, delivered without a cluster: from its outbox, and from its journal what
no tracker got to write into that."""

import sqlite3
from pathlib import Path

from orchestrator.controller.tracker_client import missing_calls
from orchestrator.errors import NotFinished, NotFound
from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.run_history import Recollection, read_status
from orchestrator.run_records.tracker_setup import tracker_setup
from orchestrator.spec.job import JobSpec
from orchestrator.storage.journal import newest_epoch
from orchestrator.tracking.outbox import num_waiting
from orchestrator.tracking.tracker import Tracker, TrackerState


def waits_for_delivery(run_dir: Path) -> int:
    """How many values and other things lie in the run's outbox.

    Raises:
        NotFinished: a tracker is at work on it.
    """
    try:
        return num_waiting(run_dir / "tracking")
    except sqlite3.OperationalError as error:
        raise NotFinished(
            f"the tracker of run {run_dir.name} is at work: it delivers by itself", unchanged="Nothing was changed."
        ) from error


def deliver(run_dir: Path, timeout_s: float) -> TrackerState:
    """Send everything that MLflow lacks of the run, its end included. Repeats are harmless.

    Returns:
        where delivery stands: nothing waits any more, or `error` says why.

    Raises:
        NotFound: the run has not ended.
        NotFinished: a tracker is at work on it.
    """
    try:
        status = read_status(run_dir)
    except NotFound as error:
        raise NotFinished(
            f"run {run_dir.name} has not ended, as far as its storage knows",
            remedy="Its tracker delivers while it goes on; if it lost its cluster, `orchestrator resume` goes on.",
            unchanged="Nothing was changed.",
        ) from error
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    epoch = newest_epoch(run_dir)
    tracker = Tracker(tracker_setup(run_dir.name, run_dir, job))
    data = Recollection(run_dir, RunLimits.of(run_dir.name, job)).data
    for method, args in missing_calls(run_dir, tracker.position(), data):
        if method != "artifact" or Path(args[0]).exists():
            getattr(tracker, method)(epoch, *args)
    tracker.finish(epoch, status.phase.value, status.why, timeout_s)
    return tracker.describe()
