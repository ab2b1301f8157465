"""The queue between a run and its tracker: callers never wait and never see the tracker fail.

One thread connects, sends in order, and after a failure tries the same again with growing pauses. Of every metric
only steps newer than the newest published one are sent, so a metric has one value per step, whatever is replayed.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from orchestrator.tracking.sink import MetricPoint, Outcome, RunInfo, Sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """How the thread works. The defaults are for a training run."""

    flush_s: float = 1.0  # a point waits at most this long
    flush_points: int = 500  # or until so many wait
    capacity: int = 100_000  # more points than this are dropped, the newest first: some 20 MB
    idle_s: float = 5.0  # how often the sink is asked to flush while nothing comes
    retry_s: float = 0.5  # pause after the first failure; doubles
    retry_max_s: float = 30.0


@dataclass(frozen=True)
class Event:
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Artifact:
    path: Path


@dataclass(frozen=True)
class Finish:
    """The end of the run. `delivered` is set when it, and all before it, has arrived."""

    outcome: Outcome
    reason: str
    delivered: threading.Event = field(default_factory=threading.Event)


Item = MetricPoint | Event | Artifact | Finish


@dataclass(frozen=True)
class Delivery:
    """Where the publisher stands. `error` is the newest failure, empty once the tracker takes things again."""

    url: str
    tracked_id: str
    queued: int
    published: int
    dropped: int
    error: str


class Publisher:
    """Sends what a run publishes to the sink that `connect` makes, from a thread that ends with the process.

    Args:
        connect: makes the sink; called again until it succeeds.
        run: what the sink is told of the run.
    """

    def __init__(self, connect: Callable[[], Sink], run: RunInfo, pace: Pace = Pace()) -> None:
        self._connect = connect
        self._run = run
        self._pace = pace
        self._changed = threading.Condition()  # guards the queue and `_hurry`
        self._queue: deque[Item] = deque()
        self._hurry = False
        self._sink: Sink | None = None
        self._newest: dict[str, int] = {}
        self._published = 0
        self._dropped = 0
        self._error = ""
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def put(self, items: Sequence[Item]) -> None:
        """Queue items for delivery, in order. Returns at once. Points beyond the capacity are dropped and counted."""
        with self._changed:
            for item in items:
                if isinstance(item, MetricPoint) and len(self._queue) >= self._pace.capacity:
                    self._dropped += 1
                else:
                    self._queue.append(item)
                    self._hurry |= isinstance(item, Finish)
            self._changed.notify()

    def state(self) -> Delivery:
        sink = self._sink
        return Delivery(
            url=sink.url if sink else "",
            tracked_id=sink.tracked_id if sink else "",
            queued=len(self._queue),
            published=self._published,
            dropped=self._dropped,
            error=self._error,
        )

    def _work(self) -> None:
        pause_s = self._pace.retry_s
        while True:
            try:
                self._deliver()
            except Exception as error:  # whatever the tracker throws: the run goes on, and `state` says so
                self._note(f"{type(error).__name__}: {error}")
                self._wait(pause_s, until=lambda: self._hurry)
                pause_s = min(2 * pause_s, self._pace.retry_max_s)
            else:
                self._note("")
                pause_s = self._pace.retry_s
                self._wait(self._pace.idle_s, until=lambda: bool(self._queue))
                self._wait(self._pace.flush_s, until=self._is_due)

    def _is_due(self) -> bool:
        return self._hurry or len(self._queue) >= self._pace.flush_points

    def _wait(self, timeout_s: float, until: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(until, timeout=timeout_s)

    def _deliver(self) -> None:
        """Send all that is queued. What was sent leaves the queue, so a failure repeats only what it broke off."""
        self._hurry = False
        if self._sink is None:
            sink = self._connect()
            sink.start(self._run)
            self._newest = dict(sink.newest_steps())
            self._sink = sink
        while self._queue:
            count = self._send_first(self._sink)
            with self._changed:
                for _ in range(count):
                    self._queue.popleft()
        self._sink.flush()

    def _send_first(self, sink: Sink) -> int:
        """Send the first item, or the points up to the next other item; returns how many items that were."""
        match self._queue[0]:
            case MetricPoint():
                return self._send_points(sink)
            case Event(fields):
                sink.log_event(fields)
            case Artifact(path) if path.exists():
                sink.log_artifact(path)
            case Artifact(path):
                logger.warning("artifact %s is gone and was not published", path)
            case Finish(outcome, reason, delivered):
                sink.finish(outcome, reason)
                delivered.set()
        return 1

    def _send_points(self, sink: Sink) -> int:
        with self._changed:
            points = _leading_points(islice(self._queue, self._pace.flush_points))
        newest = dict(self._newest)
        fresh = []
        for point in points:
            if point.step > newest.get(point.name, -1):
                newest[point.name] = point.step
                fresh.append(point)
        if fresh:
            sink.log_metrics(fresh)
        self._newest = newest
        self._published += len(fresh)
        return len(points)

    def _note(self, error: str) -> None:
        """One line per change between failing and working."""
        if error and not self._error:
            logger.warning("tracking of run %s fails, will be tried again: %s", self._run.run_id, error)
        if self._error and not error:
            logger.info("tracking of run %s works again", self._run.run_id)
        self._error = error


def _leading_points(items: Iterable[Item]) -> list[MetricPoint]:
    points = []
    for item in items:
        if not isinstance(item, MetricPoint):
            break
        points.append(item)
    return points
