"""Delivery of an ended run's waiting values to MLflow, without a cluster: from its outbox, and from its journal what no
tracker had written to the outbox."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

from orchestrator.errors import NotFinished, NotFound
from orchestrator.policy.health.expert_load import shown_loads
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.final_status import read_status
from orchestrator.run_records.job_files import TEXT, read_job
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.rollback import committed_backwards
from orchestrator.run_records.run_history import RunHistory, entries_after
from orchestrator.run_records.tracker_setup import outbox_of, tracker_setup
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.chain_reader import newest_term
from orchestrator.telemetry.step_metrics import points_of_event, points_of_steps
from orchestrator.tracking.outbox_file import num_waiting
from orchestrator.tracking.sinks.sink import MetricPoint, TrackerPosition
from orchestrator.tracking.tracker import Tracker, TrackerState

POINTS_PER_CALL = 2000

Call = tuple[Callable[..., None], tuple[Any, ...]]  # a method of `Tracker`, and what follows the term


def waits_for_delivery(run_dir: Location) -> int:
    """Number of values and other items in the run's outbox.

    Raises:
        NotFinished: a tracker is using it.
    """
    try:
        return num_waiting(outbox_of(run_dir))
    except sqlite3.OperationalError as error:
        raise NotFinished(
            f"the tracker of run {run_dir.name} is at work: it delivers by itself", unchanged="Nothing was changed."
        ) from error


def deliver(run_dir: Location, timeout_s: float) -> TrackerState:
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
            remedy="Its tracker delivers while it is active; without a cluster `orchestrator resume` continues it.",
            unchanged="Nothing was changed.",
        ) from error
    job = read_job(run_dir)
    term = newest_term(run_objects(run_dir))
    tracker = Tracker(tracker_setup(run_dir.name, run_dir, job))
    history = RunHistory(run_dir, RunLimits.of(run_dir.name, job))
    for method, args in missing_calls(run_dir, tracker.position(), history.progress, history.data):
        with suppress(*((NotFound,) if method is Tracker.artifact else ())):
            method(tracker, term, *args)
    tracker.finish(term, status.phase.value, status.why, timeout_s)
    return tracker.describe()


def missing_after(run_dir: Location, job: JobSpec, position: TrackerPosition, data: PreparedData | None) -> list[Call]:
    """Calls for everything that the run's tracker at `position` lacks."""
    history = RunHistory(run_dir, RunLimits.of(run_dir.name, job))
    return list(missing_calls(run_dir, position, history.progress, data))


def missing_calls(
    run_dir: Location, position: TrackerPosition, progress: Progress, data: PreparedData | None
) -> Iterator[Call]:
    """Calls for everything that a tracker at `position` lacks.

    Args:
        progress: by the run's journal, which is read from its newest entry backwards, as far as is needed.
    """
    yield Tracker.artifact, (str(run_dir / TEXT),)
    if data is not None:
        yield from calls_for_data(data)
    before = position.event
    for entry in entries_after(run_dir, position.event, leave_out=(StateDecided, StepsCommitted)):
        if not entry.event.is_internal:
            yield Tracker.event, (entry, points_of_event(entry), before)
            before = entry.seq
    newest_first = committed_backwards(run_objects(run_dir), progress.watermark)
    steps = list(takewhile(lambda record: record.step > position.step, newest_first))[::-1]
    points, loads, after = _points_of(progress, steps), shown_loads(steps), position.step
    while points:
        last = points[min(POINTS_PER_CALL, len(points)) - 1].step  # a step's values stay together
        batch = [point for point in points[: 2 * POINTS_PER_CALL] if point.step <= last]
        yield Tracker.publish, (batch, after, {step: loads[step] for step in loads if after < step <= last})
        points, after = points[len(batch) :], last


def _points_of(progress: Progress, steps: list[StepRecord]) -> list[MetricPoint]:
    """Metric points of the newest steps of `progress`."""
    tokens = sum(record.batch.tokens for record in steps)
    skipped = sum(not record.update.applied for record in steps)
    before = replace(progress, tokens=progress.tokens - tokens, skipped=progress.skipped - skipped)
    return points_of_steps(before, steps)


def calls_for_data(data: PreparedData) -> list[Call]:
    artifacts: list[Call] = [(Tracker.artifact, (data.tokenizer,))] if data.tokenizer else []
    return [*artifacts, (Tracker.inputs, (data.datasets,))]
