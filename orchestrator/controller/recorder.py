"""Recorder of a run's steps and notices: fetched from its members, journalled, then published.

Steps are published once run storage has them, notices once they are recorded.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence

from orchestrator.controller.run_metrics import values_of_run
from orchestrator.controller.services.tracker_client import TrackerClient
from orchestrator.controller.startup import OpenedRun
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.policy.health.expert_collapse import routing_news
from orchestrator.policy.health.expert_load import shown_loads
from orchestrator.policy.lifecycle import phase_of
from orchestrator.policy.publication import publishable
from orchestrator.policy.replay_check import differences
from orchestrator.policy.state.checkpoint_parts import complete_checkpoints
from orchestrator.policy.state.run_state import Observation
from orchestrator.protocol.events.base import Event, JournalEntry, plain_of
from orchestrator.protocol.events.notices import (
    GradientSaturated,
    NumericsDiffer,
    NumericsRecorded,
    StorageFails,
    StorageWorks,
    TrackingFails,
    TrackingWorks,
)
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.worker_report import Report, Saturation
from orchestrator.storage.condition import StorageCondition, StorageTrouble
from orchestrator.storage.tasks import StorageTask
from orchestrator.telemetry.prometheus import Exporter
from orchestrator.telemetry.step_metrics import points_of_event, points_of_steps
from orchestrator.tracking.sinks.sink import MetricPoint

log = logging.getLogger("orchestrator.control")

RECORDS_EVERY_S = 1.0  # steps are fetched, journalled and published in batches of this length


class StepRecorder:
    """Records the steps and notices of one run, for its controller."""

    def __init__(self, run: OpenedRun, worker_group: WorkerGroup, tracker: TrackerClient, exporter: Exporter) -> None:
        self._run, self._memory, self._worker_group = run, run.memory, worker_group
        self._tracker, self._exporter = tracker, exporter
        self._asked_s = 0.0  # when records were last requested; inf while a request is open
        self._numerics: dict[str, str] = {}  # by worker, as journalled
        self._tracking_fails, self._storage = False, run.memory.storage  # as journalled

    def ask(self, seen: Observation, now_s: float) -> None:
        """Request records at intervals, and at once when a checkpoint waits for them."""
        limits, state, watermark = self._run.limits, self._memory.state, self._memory.progress.watermark
        if not state.members or publishable(limits, state, seen) <= watermark or self._asked_s == float("inf"):
            return
        if complete_checkpoints(state, seen) or now_s - self._asked_s >= RECORDS_EVERY_S:
            record_source = self._worker_group.record_source(state.members, watermark)
            self._asked_s = (
                float("inf") if self._worker_group.ask_records(record_source, watermark, self.answered) else now_s
            )

    def answered(self) -> None:
        """Note that the request for records has ended, with an answer or an error."""
        self._asked_s = time.monotonic()

    def enter(self, records: Sequence[StepRecord], observe: Callable[[], Observation]) -> StorageTask[None]:
        """Journal and publish the steps that may be, by what `observe` returns then."""
        before = self._memory.progress
        up_to = publishable(self._run.limits, self._memory.state, observe())
        fresh, begun = yield from self._memory.absorb(records, up_to)
        points = points_of_steps(before, fresh)
        self._tracker.publish_steps(points, after=before.watermark, loads=shown_loads(fresh))
        self._exporter.show(points)
        for entry in begun:
            self.publish(entry)
        yield from self._judge_routing()
        self._tracker.look()

    def _judge_routing(self) -> StorageTask[None]:
        """Journal when experts collapse or their loads swing, and when that is over."""
        for news in routing_news(self._run.job.model, self._memory.progress.recent, self._memory.troubles):
            yield from self.note(news)
            self._memory.troubles = self._memory.troubles.after(news)

    def note(self, event: Event, stored: bool = False) -> StorageTask[None]:
        """Journal and publish an event that no decision made. `stored`: what follows waits until run storage has it."""
        self.publish((yield from self._memory.note(event, stored)))

    def publish(self, entry: JournalEntry) -> None:
        """Publish a journalled event."""
        log.info("run %s: %s", self._run.run_id, plain_of(entry.event))
        self._tracker.publish_event(entry)
        self._exporter.show(points_of_event(entry))

    def are_new(self, worker: str, report: Report) -> bool:
        """Whether this report has numerics or gradients for `hear` to journal."""
        found = report.health.saturated
        is_saturated = found is not None and (worker, found.step) not in self._memory.saturated
        return is_saturated or self._numerics.get(worker, "") != report.process.numerics

    def hear(self, worker: str, report: Report) -> StorageTask[None]:
        """Journal a worker's numerics, and a gradient of it that was too large, from its report."""
        yield from self._hear_numerics(worker, report.process.numerics)
        yield from self._hear_saturation(worker, report.health.saturated)

    def _hear_numerics(self, worker: str, numerics: str) -> StorageTask[None]:
        """Journal what determines the bits of the run's results, and every worker that differs in it."""
        if not numerics or self._numerics.get(worker) == numerics:
            return
        fingerprint = json.loads(numerics)
        if self._memory.numerics is None:
            yield from self.note(NumericsRecorded(fingerprint))
            self._memory.numerics = fingerprint
        differs = differences(self._memory.numerics, fingerprint)
        if differs and self._memory.differing.get(worker) != differs:
            yield from self.note(NumericsDiffer(worker, differs))
            self._memory.differing[worker] = differs
        self._numerics[worker] = numerics

    def _hear_saturation(self, worker: str, found: Saturation | None) -> StorageTask[None]:
        """Journal a worker's gradient that was too large for an exact sum."""
        if found is None or (worker, found.step) in self._memory.saturated:
            return
        yield from self.note(GradientSaturated(worker, found.step, found.parameters))
        self._memory.saturated.add((worker, found.step))

    def show(self, readings: Sequence[MetricPoint]) -> None:
        """Publish values that are not journalled."""
        self._tracker.publish(readings)
        self._exporter.show(readings)

    def show_run(self, seen: Observation, trouble: StorageTrouble | None, now_s: float) -> None:
        """Show the run's live metrics, at intervals. `trouble` is that of its storage."""
        if self._exporter.is_due(now_s):
            values = values_of_run(self._run.limits, self._run.job.model, self._memory, seen)
            self._exporter.show_run(now_s, values, phase_of(self._memory.state, seen), _condition(trouble))

    def tracking_changed(self) -> bool:
        """Whether metrics began to wait, or arrive again, since that was journalled."""
        return (self._tracker.warning is not None) != self._tracking_fails

    def note_tracking(self) -> StorageTask[None]:
        """Journal when metrics begin to wait, and when they arrive again."""
        warning = self._tracker.warning
        if self.tracking_changed():
            yield from self.note(TrackingWorks() if warning is None else TrackingFails(warning))
            self._tracking_fails = warning is not None

    def storage_changed(self, trouble: StorageTrouble | None) -> bool:
        """Whether run storage began to fail, or works again, since that was journalled."""
        return (trouble is None) != (self._storage is StorageCondition.WELL)

    def note_storage(self, trouble: StorageTrouble | None) -> StorageTask[None]:
        """Journal when run storage begins to fail, and when it works again."""
        if self.storage_changed(trouble):
            event = StorageWorks() if trouble is None else StorageFails(trouble.condition, trouble.why)
            yield from self.note(event)
            self._storage = _condition(trouble)


def _condition(trouble: StorageTrouble | None) -> StorageCondition:
    return StorageCondition.WELL if trouble is None else trouble.condition
