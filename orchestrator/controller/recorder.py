"""A run's account: finished steps fetched from its members, and what else users should know.

All of it is journalled, then published. What can't be written down is fetched, or said, again.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from orchestrator.controller.tracker_client import TrackerClient
from orchestrator.controller.worker_group import WorkerGroup
from orchestrator.errors import StorageError
from orchestrator.policy.health.expert_collapse import routing_news
from orchestrator.policy.health.expert_load import shown_loads
from orchestrator.policy.replay_check import differences
from orchestrator.policy.state.run_state import Observation
from orchestrator.policy.termination import complete_checkpoints, publishable
from orchestrator.protocol.events.base import Event, JournalEntry, plain_of
from orchestrator.protocol.events.notices import (
    GradientSaturated,
    NumericsDiffer,
    NumericsRecorded,
    TrackingFails,
    TrackingWorks,
)
from orchestrator.protocol.messages import Saturation, StepRecord
from orchestrator.run_records.run_history import JournaledRun
from orchestrator.spec.model import ModelSpec
from orchestrator.telemetry.prometheus import Exporter
from orchestrator.telemetry.step_metrics import points_of_event, points_of_steps
from orchestrator.tracking.sink import MetricPoint

log = logging.getLogger("orchestrator.control")

RECORDS_EVERY_S = 1.0  # steps are received, written down and published in batches of this length


class StepRecorder:
    """Of one run, kept by its controller."""

    def __init__(
        self,
        run_id: str,
        model: ModelSpec,
        memory: JournaledRun,
        worker_group: WorkerGroup,
        tracker: TrackerClient,
        exporter: Exporter,
    ) -> None:
        self._run_id, self._model, self._memory, self._worker_group = run_id, model, memory, worker_group
        self._tracker, self._exporter = tracker, exporter
        self._asked_s = 0.0  # when records were last asked for; inf while they are
        self._numerics: dict[str, str] = {}  # by worker, as it was written down
        self._tracking_fails = False  # and users were told

    def ask(self, seen: Observation, now_s: float) -> None:
        """Ask for records once in a while, and at once when a checkpoint waits for them."""
        state, watermark = self._memory.state, self._memory.progress.watermark
        if not state.members or publishable(state, seen) <= watermark or self._asked_s == float("inf"):
            return
        if complete_checkpoints(state, seen) or now_s - self._asked_s >= RECORDS_EVERY_S:
            record_source = self._worker_group.record_source(state.members, watermark)
            self._asked_s = float("inf") if self._worker_group.ask_records(record_source, watermark) else now_s

    def answered(self) -> None:
        """The question for records has an answer, whatever it is."""
        self._asked_s = time.monotonic()

    def enter(self, records: Sequence[StepRecord], seen: Observation) -> None:
        """Enter those steps that can't be lost any more, and publish them."""
        with suppress(StorageError):  # they are asked for again
            before = self._memory.progress
            fresh, begun = self._memory.absorb(records, up_to=publishable(self._memory.state, seen))
            points = points_of_steps(before, fresh)
            self._tracker.publish_steps(points, after=before.watermark, loads=shown_loads(fresh))
            self._exporter.show(points)
            for entry in begun:
                self.tell(entry)
            self._judge_routing()
        self._tracker.look()

    def _judge_routing(self) -> None:
        """Write down when experts collapse or their loads swing, and when that is over."""
        for news in routing_news(self._model, self._memory.progress.recent, self._memory.troubles):
            self.tell(self._memory.note(news))
            self._memory.troubles = self._memory.troubles.after(news)

    def note(self, event: Event) -> None:
        """Write down an event that no decision made, and publish it. Raises StorageError."""
        self.tell(self._memory.note(event))

    def tell(self, entry: JournalEntry) -> None:
        """Publish an event that is in the journal."""
        log.info("run %s: %s", self._run_id, plain_of(entry.event))
        self._tracker.publish_event(entry)
        self._exporter.show(points_of_event(entry))

    def hear_numerics(self, worker: str, told: str) -> None:
        """Write down what decides the bits of the run's results, and every worker that has something else."""
        if not told or self._numerics.get(worker) == told:
            return
        fingerprint = json.loads(told)
        with suppress(StorageError):  # heard again with its next answer
            if self._memory.numerics is None:
                self.note(NumericsRecorded(fingerprint))
                self._memory.numerics = fingerprint
            differs = differences(self._memory.numerics, fingerprint)
            if differs and self._memory.differing.get(worker) != differs:
                self.note(NumericsDiffer(worker, differs))
                self._memory.differing[worker] = differs
            self._numerics[worker] = told

    def hear_saturation(self, worker: str, told: Saturation | None) -> None:
        """Write down whose gradient was too large for an exact sum."""
        if told is None or (worker, told.step) in self._memory.saturated:
            return
        with suppress(StorageError):  # heard again with its next answer
            self.note(GradientSaturated(worker, told.step, told.parameters))
            self._memory.saturated.add((worker, told.step))

    def show(self, readings: Sequence[MetricPoint]) -> None:
        """Publish values that the journal doesn't hold."""
        self._tracker.publish(readings)
        self._exporter.show(readings)

    def tell_of_tracking(self) -> None:
        """Write down when metrics begin to wait, and when they arrive again."""
        warning = self._tracker.warning
        if (warning is not None) != self._tracking_fails:
            with suppress(StorageError):  # said at the next look
                entry = self._memory.note(TrackingWorks() if warning is None else TrackingFails(warning))
                self._tracking_fails = warning is not None
                self.tell(entry)
