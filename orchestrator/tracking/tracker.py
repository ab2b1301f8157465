"""The tracker of one run: a plain class for a process of its own, called by the run's controller.

    tracker = Tracker(TrackerSetup(uri="sqlite:////runs/mlflow.db", experiment="demo", run=RunInfo("r1", "r1"),
                                   directory="/runs/r1/tracking", artifacts="/runs/mlflow-artifacts"))
    tracker.publish(term, [MetricPoint("train/loss", 2.5, step=0, time=time.time())], after=-1)
    tracker.finish(term, "succeeded")

Training never waits for it, and failures of MLflow never raise. Items are on disk when a method returns.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from orchestrator.errors import NotFound, TermSuperseded
from orchestrator.policy.health.expert_load import Loads
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import location_of, objects_at
from orchestrator.tracking.history import History, write_table
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.outbox_file import FILE
from orchestrator.tracking.publisher import Publisher, Reporting
from orchestrator.tracking.sink import (
    Artifact,
    Dataset,
    Finish,
    Inputs,
    MetricPoint,
    Outcome,
    Sink,
    TrackerPosition,
    TrackerSetup,
    check_uri,
    redacted,
)

logger = logging.getLogger(__name__)


class TrackerState(TypedDict):
    """Result of `Tracker.describe`. `url` and `mlflow_run_id` are empty until MLflow has answered once."""

    uri: str
    url: str
    mlflow_run_id: str
    term: int  # the highest seen
    position: int  # the newest step up to which no values are missing here
    waiting: int  # items on disk that MLflow has not taken yet
    published: int  # metric values that this process has sent to MLflow
    error: str  # the newest failure; empty once MLflow takes items again


class Tracker:
    """Publishes one run to MLflow. Thread-safe; every method but `finish` returns once the item is on disk.

    Raises:
        UsageError: the URI has no supported form.
        NotFinished: another process delivers for this run.
    """

    def __init__(self, setup: TrackerSetup) -> None:
        check_uri(setup.uri)
        self._uri = setup.uri
        self._term = -1
        self._term_lock = threading.Lock()
        self._directory = Path(setup.directory)
        self._outbox = _open_outbox(self._directory)
        self._outbox.withdraw_finish()  # the starting controller continues the run, or reports its end again
        self._publisher = publisher_of(setup, self._outbox)

    def position(self) -> TrackerPosition:
        """What was published without gaps."""
        return self._outbox.position

    def publish(
        self, term: int, points: Sequence[MetricPoint], after: int | None = None, loads: Mapping[int, Loads] = {}
    ) -> None:
        """Take values. A metric's values for its newest step or older ones are dropped as repeats.

        Args:
            after: the points are those of all steps after this one.
            loads: expert loads by step, for steps that the heat map shows.

        Raises:
            ProtocolError: values of earlier steps are missing; see `position`. Nothing was taken.
            TermSuperseded: a controller with a higher term has published here. The methods below raise it too.
        """
        self._admit(term)
        self._outbox.put_points(points, after, loads)
        self._publisher.wake()

    def event(
        self, term: int, entry: JournalEntry, points: Sequence[MetricPoint] = (), after: int | None = None
    ) -> None:
        """Take an event of the journal, with values derived from it; an event with a known `seq` is dropped.

        Args:
            after: `seq` of the run's event before it. Raises ProtocolError, as `publish` does, if that is missing.

        Events `checkpoint`, `checkpoints_deleted` and `resumed` create and update models in MLflow.
        """
        self._admit(term)
        self._outbox.put_event(entry, points, after)
        self._publisher.wake()

    def inputs(self, term: int, datasets: Sequence[Dataset]) -> None:
        """Take the datasets for training and validation."""
        self._admit(term)
        self._outbox.put([Inputs(tuple(datasets))])
        self._publisher.wake()

    def artifact(self, term: int, path: str) -> None:
        """Take the path of a file or directory, which is copied later, or the URL of an object, which is copied now.
        Raises NotFound if it doesn't exist, OSError if it can't be copied."""
        self._admit(term)
        place = location_of(path)
        file = place if isinstance(place, Path) else self._copy_of(place)
        if file is None or not file.exists():
            raise NotFound(f"artifact {path} does not exist", unchanged="Nothing was published.")
        self._outbox.put([Artifact(str(file))])
        self._publisher.wake()

    def _copy_of(self, place: BucketUrl) -> Path | None:
        """The object in a file beside what waits; None if there is no such object."""
        file = self._directory / place.name
        try:
            file.write_bytes(objects_at(place.parent).get(place.name))
        except FileNotFoundError:
            return None
        return file

    def finish(self, term: int, outcome: str, reason: str = "", timeout_s: float = 30.0) -> bool:
        """Send everything, then mark the run as ended. Blocks for up to `timeout_s`.

        Args:
            outcome: an `Outcome`: succeeded, failed, stopped, paused.

        Returns:
            whether everything has arrived; if not, `describe` gives the reason, and delivery goes on.
        """
        self._admit(term)
        self._outbox.put_finish(Finish(Outcome(outcome), reason))
        self._publisher.wake(hurry=True)
        return self._publisher.wait(timeout_s)

    def describe(self) -> TrackerState:
        state = self._publisher.state()
        return TrackerState(
            uri=redacted(self._uri),
            url=state.url,
            mlflow_run_id=state.tracked_id,
            term=self._term,
            position=self._outbox.position.step,
            waiting=state.waiting,
            published=state.published,
            error=state.error,
        )

    def _admit(self, term: int) -> None:
        with self._term_lock:
            if term < self._term:
                raise TermSuperseded(
                    f"term {term} may not publish: term {self._term} does", unchanged="Nothing was published."
                )
            self._term = term


def publisher_of(setup: TrackerSetup, outbox: Outbox) -> Publisher:
    """A publisher to MLflow. Its thread imports MLflow, which takes 2 s, so the caller doesn't wait."""
    directory = Path(setup.directory)

    def connect() -> Sink:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # The publisher retries. MLflow's own retries would hide an unreachable server for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from orchestrator.tracking.mlflow_sink import MlflowSink

        return MlflowSink(setup.uri, setup.experiment, setup.artifacts)

    def explain(error: Exception) -> str:
        from orchestrator.tracking.mlflow_errors import explain

        return explain(error, setup.uri)

    def charts(history: History) -> Sequence[Path]:
        from orchestrator.tracking.charts import draw  # and with it matplotlib
        from orchestrator.tracking.load_chart import draw_loads

        return [*draw(history, setup.run.name, directory), *draw_loads(history.loads, setup.run.name, directory)]

    reporting = Reporting(table=lambda history: write_table(history, directory), charts=charts)
    return Publisher(outbox, connect, setup.run, reporting, explain)


def _open_outbox(directory: Path) -> Outbox:
    """The outbox; a damaged one is set aside, and the controller publishes its journal again."""
    try:
        return Outbox(directory)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # a fault of the disk, not of the file
            raise
        damaged = (directory / FILE).rename(directory / f"{FILE}.damaged")
        logger.error("the outbox can't be read: %s; it is kept as %s", error, damaged)
        (directory / f"{FILE}-journal").unlink(missing_ok=True)
        return Outbox(directory)
