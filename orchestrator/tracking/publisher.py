"""Delivery from the outbox to the tracker: one thread connects, sends in order, and retries after failures.

Callers never wait and never see the tracker fail: their items are on disk, and memory holds one batch of them.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.tracking.history import History
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.sinks.sink import (
    Artifact,
    Checkpoint,
    CheckpointMark,
    Finish,
    Inputs,
    Item,
    MetricPoint,
    RunInfo,
    Sink,
)

logger = logging.getLogger(__name__)

LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Pace:
    """Timing of the thread. The defaults suit a training run: a call costs some 30 ms of a core, so calls are few."""

    flush_s: float = 5.0  # longest wait of a value
    batch: int = 1000  # values per call: MLflow's limit
    retry_s: float = 0.5  # pause after the first failure; doubles
    retry_max_s: float = 30.0
    table_s: float = 30.0  # interval for sending new events
    charts_s: float = 600.0  # interval for sending charts, which take a second to draw


@dataclass(frozen=True)
class Reporting:
    """Writers of files that show the run's history. Each returns the paths that it wrote."""

    table: Callable[[History], Path]
    charts: Callable[[History], Sequence[Path]]


@dataclass(frozen=True)
class Delivery:
    """State of the publisher. `error` is the newest failure, empty once the tracker takes items again."""

    url: str
    tracked_id: str
    waiting: int
    published: int
    error: str


class Publisher:
    """Sends items of the outbox to the sink that `connect` makes, from a thread that ends with the process.

    Args:
        connect: makes the sink; called again until it succeeds.
        reporting: None for a sink that takes no files.
        explain: turns a failure into one line for the user.
    """

    def __init__(
        self,
        outbox: Outbox,
        connect: Callable[[], Sink],
        run: RunInfo,
        reporting: Reporting | None,
        explain: Callable[[Exception], str],
        pace: Pace = Pace(),
    ) -> None:
        self._outbox, self._connect, self._run = outbox, connect, run
        self._reporting, self._explain, self._pace = reporting, explain, pace
        self._changed = threading.Condition()  # guards `_hurry` and `_idle`
        self._hurry = False
        self._idle = False  # nothing is waiting or being sent
        self._sink: Sink | None = None
        self._published = 0
        self._error = ""
        self._num_told = 0  # events in the last table
        self._table_s = self._charts_s = time.monotonic()
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def wake(self, hurry: bool = False) -> None:
        """Report that an item was put into the outbox; with `hurry`, send at once."""
        with self._changed:
            self._hurry |= hurry
            self._idle = False
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the tracker has everything. Returns False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle, timeout_s)

    def state(self) -> Delivery:
        sink = self._sink
        return Delivery(
            url=sink.url if sink else "",
            tracked_id=sink.tracked_id if sink else "",
            waiting=self._outbox.num_waiting,
            published=self._published,
            error=self._error,
        )

    def _work(self) -> None:
        os.nice(LOWEST_PRIORITY)  # of this thread only, on Linux: training has priority when cores are scarce
        pause_s = self._pace.retry_s
        while True:
            try:
                self._deliver()
            except Exception as error:  # any error of the tracker: the run goes on, and `state` reports it
                self._note(self._explain(error))
                self._rest(pause_s)
                pause_s = min(2 * pause_s, self._pace.retry_max_s)
            else:
                self._note("")
                pause_s = self._pace.retry_s
                self._rest(self._pace.flush_s)

    def _rest(self, pause_s: float) -> None:
        with self._changed:
            self._idle = not self._error and self._outbox.num_waiting == 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._hurry, timeout=pause_s)

    def _deliver(self) -> None:
        """Send all waiting items. Sent items leave the outbox, so only the interrupted call is repeated."""
        with self._changed:
            self._hurry = False
        if self._sink is None:
            sink = self._connect()
            sink.start(self._run)
            self._outbox.join(sink.newest_steps())
            self._sink = sink
        while True:
            number, items = self._outbox.head(self._pace.batch)
            if not items:
                break
            self._send(self._sink, items)
            self._outbox.remove(number)
        self._report(self._sink, is_last=False)

    def _send(self, sink: Sink, items: Sequence[Item]) -> None:
        match items[0]:
            case MetricPoint():
                points = [item for item in items if isinstance(item, MetricPoint)]
                sink.log_metrics(points)
                self._published += len(points)
            case Artifact(path) if Path(path).exists():
                sink.log_artifact(Path(path))
            case Artifact(path):
                logger.warning("artifact %s is gone and was not published", path)
            case Inputs(datasets):
                sink.log_inputs(datasets)
            case Checkpoint():
                sink.log_checkpoint(items[0])
            case CheckpointMark():
                sink.mark_checkpoints(items[0])
            case Finish():
                self._report(sink, is_last=True)
                sink.finish(items[0])

    def _report(self, sink: Sink, is_last: bool) -> None:
        """Send the table and the charts, each when it is due."""
        if (reporting := self._reporting) is None:
            return
        now_s = time.monotonic()
        table_due = is_last or now_s - self._table_s >= self._pace.table_s
        charts_due = is_last or now_s - self._charts_s >= self._pace.charts_s
        if not (table_due or charts_due):
            return
        history = self._outbox.history()
        if table_due and history.events and (is_last or len(history.events) > self._num_told):
            sink.log_table(reporting.table(history))
            self._num_told = len(history.events)
            self._table_s = now_s
        if charts_due and history.curves["train/loss"]:
            for path in self._drawn(history, reporting):
                sink.log_artifact(path)
            self._charts_s = now_s

    def _drawn(self, history: History, reporting: Reporting) -> Sequence[Path]:
        """The charts; none if they can't be drawn, so that a fault in drawing doesn't block later items."""
        try:
            return reporting.charts(history)
        except Exception:
            logger.exception("the charts of run %s can't be drawn", self._run.run_id)
            return ()

    def _note(self, error: str) -> None:
        """Log one line at each change between failing and working."""
        if error and not self._error:
            logger.warning("tracking of run %s fails, will be tried again: %s", self._run.run_id, error)
        if self._error and not error:
            logger.info("tracking of run %s works again", self._run.run_id)
        self._error = error
