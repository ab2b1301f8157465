"""Prometheus metrics of a run, through `ray.util.metrics`.

The controller sets values in its own memory, in microseconds; Ray sends them to its agent on the node every 10 s, and
Prometheus scrapes the agent. Nothing waits for any of it.

All are Ray gauges, counters too: the agent drops a gauge's series 20 s after its process has ended, a counter's never.
So a run's series end with its controller. Totals are summed here, and begin at 0 with each controller.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from ray.util.metrics import Gauge

from orchestrator.metrics.metric import Metric, MetricKind
from orchestrator.metrics.registry import DECLARED, metric
from orchestrator.protocol.status import RunPhase
from orchestrator.storage.condition import StorageCondition
from orchestrator.tracking.sinks.sink import MetricPoint

log = logging.getLogger("orchestrator.control")

EVERY_S = 1.0  # how often values that belong to no step are set


class Series(Protocol):
    """The part of `ray.util.metrics.Gauge` that is used here."""

    def set(self, value: float, tags: dict[str, str]) -> None: ...


def ray_gauge(declared: Metric) -> Series:
    labels = ("run", declared.label) if declared.label else ("run",)
    gauge: Series = Gauge(declared.prometheus, f"{declared.meaning} [{declared.unit}]", labels)
    return gauge


class Exporter:
    """Exports the metrics of one run. A failure is logged once and never reaches the run.

    Args:
        make: makes the series of a metric.
    """

    def __init__(self, run_id: str, make: Callable[[Metric], Series] = ray_gauge) -> None:
        self._run_id, self._make = run_id, make
        self._series: dict[str, Series] = {}
        self._sums: dict[str, float] = {}
        self._shown_s = float("-inf")  # when values that belong to no step were last set
        self._has_failed = False
        # From the beginning, so that what has not happened yet is 0 rather than missing, and its first time is a rise.
        with self._harmless():
            for declared in DECLARED:
                if declared.kind is MetricKind.AMOUNT:
                    self._set(declared, 0.0)

    def show(self, points: Iterable[MetricPoint]) -> None:
        """Set the newest values of steps, events and nodes, in their order."""
        with self._harmless():
            for point in points:
                self._enter(point)

    def is_due(self, now_s: float) -> bool:
        """Whether `show_run` is due again."""
        return now_s - self._shown_s >= EVERY_S

    def show_run(self, now_s: float, values: Mapping[str, float], phase: RunPhase, storage: StorageCondition) -> None:
        """Set the run's current values, by metric name, its phase, and the condition of its storage."""
        self._shown_s = now_s
        with self._harmless():
            for name, value in values.items():
                self._set(metric(name), value)
            for each in RunPhase:
                if not each.ended:
                    self._set(metric("run/phase"), each is phase, each)
            for condition in StorageCondition:
                self._set(metric("run/storage"), condition is storage, condition)

    def _enter(self, point: MetricPoint) -> None:
        declared, value = metric(point.name), point.value
        if declared.kind is MetricKind.AMOUNT:
            value = self._sums[point.name] = self._sums.get(point.name, 0.0) + value
        self._set(declared, value, point.label)

    def _set(self, declared: Metric, value: float, label: str = "") -> None:
        if declared.name not in self._series:
            self._series[declared.name] = self._make(declared)
        tags = {"run": self._run_id} | ({declared.label: str(label)} if declared.label else {})
        self._series[declared.name].set(declared.factor * value, tags)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # any error of Ray's: a chart is missing, the run continues
            if not self._has_failed:
                log.exception("run %s: values for Prometheus can't be set", self._run_id)
            self._has_failed = True
