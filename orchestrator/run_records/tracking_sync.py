"""Delivery of an ended run's waiting values to MLflow, without a cluster: from its outbox, and from its journal what no
tracker had written to the outbox."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import NotFinished, NotFound
from orchestrator.policy.health.expert_load import shown_loads
from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.data_preparation import PreparedData
from orchestrator.run_records.run_history import RunHistory, committed_steps, read_entries, read_status
from orchestrator.run_records.tracker_setup import tracker_setup
from orchestrator.spec.job import JobSpec
from orchestrator.storage.journal import newest_term
from orchestrator.telemetry.step_metrics import points_after, points_of_event
from orchestrator.tracking.outbox_file import num_waiting
from orchestrator.tracking.tracker import Tracker, TrackerState

POINTS_PER_CALL = 2000

Call = tuple[Callable[..., None], tuple[Any, ...]]  # a method of `Tracker`, and what follows the term


def waits_for_delivery(run_dir: Path) -> int:
    """Number of values and other items in the run's outbox.

    Raises:
        NotFinished: a tracker is using it.
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
        state of the delivery: nothing waits any more, or `error` gives the reason.

    Raises:
        NotFinished: the run has not ended, or a tracker is using its outbox.
    """
    try:
        status = read_status(run_dir)
    except NotFound as error:
        raise NotFinished(
            f"run {run_dir.name} has not ended, as far as its storage knows",
            remedy="Its tracker delivers while it goes on; if it lost its cluster, `orchestrator resume` continues it.",
            unchanged="Nothing was changed.",
        ) from error
    job = JobSpec.model_validate_json((run_dir / "job.json").read_text())
    term = newest_term(run_dir)
    tracker = Tracker(tracker_setup(run_dir.name, run_dir, job))
    data = RunHistory(run_dir, RunLimits.of(run_dir.name, job)).data
    for method, args in missing_calls(run_dir, tracker.position(), data):
        if method is not Tracker.artifact or Path(args[0]).exists():
            method(tracker, term, *args)
    tracker.finish(term, status.phase.value, status.why, timeout_s)
    return tracker.describe()


def missing_calls(run_dir: Path, position: int, data: PreparedData | None) -> Iterator[Call]:
    """Calls for everything that a tracker with the steps up to `position` may lack. It recognises repeats."""
    yield Tracker.artifact, (str(run_dir / "job.yaml"),)
    if data is not None:
        yield from calls_for_data(data)
    entries = read_entries(run_dir)
    for entry in entries:
        if not entry.event.is_internal:
            yield Tracker.event, (entry, points_of_event(entry))
    steps = committed_steps(entries)
    points, loads, after = points_after(steps, position), shown_loads(steps), position
    while points:
        last = points[min(POINTS_PER_CALL, len(points)) - 1].step  # a step's values stay together
        batch = [point for point in points[: 2 * POINTS_PER_CALL] if point.step <= last]
        yield Tracker.publish, (batch, after, {step: loads[step] for step in loads if after < step <= last})
        points, after = points[len(batch) :], last


def calls_for_data(data: PreparedData) -> list[Call]:
    return [(Tracker.artifact, (data.tokenizer,)), (Tracker.inputs, (data.datasets,))]
