"""The tracker of one run: a plain class for a process of its own, which the run's controller calls by name.

    tracker = Tracker(TrackerSetup(uri="sqlite:////runs/mlflow.db", experiment="demo", run=RunInfo("r1", "r1"),
                                   directory="/runs/r1/tracking", artifacts="/runs/mlflow-artifacts"))
    tracker.publish(term, [MetricPoint("train/loss", 2.5, step=0, time=time.time())], after=-1)
    tracker.finish(term, "succeeded")

Training never waits for it, and it never raises because MLflow fails. What a method has returned from is on disk.
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
from orchestrator.tracking.history import History, write_table
from orchestrator.tracking.outbox import FILE, Outbox
from orchestrator.tracking.publisher import Publisher, Reporting
from orchestrator.tracking.sink import (
    Artifact,
    Dataset,
    Finish,
    Inputs,
    MetricPoint,
    Outcome,
    Sink,
    TrackerSetup,
    check_uri,
    redacted,
)

logger = logging.getLogger(__name__)


class TrackerState(TypedDict):
    """What `Tracker.describe` answers. `url` and `mlflow_run_id` are empty until MLflow has answered once."""

    uri: str
    url: str
    mlflow_run_id: str
    term: int  # the highest seen
    position: int  # the newest step up to which no values are missing here
    waiting: int  # values and other things on disk that MLflow has not taken yet
    published: int  # metric values in MLflow, sent by this process
    error: str  # the newest failure; empty once MLflow takes things again


class Tracker:
    """Publishes one run to MLflow. Thread-safe; every method but `finish` returns as soon as the disk has it.

    Raises:
        UsageError: the URI is of no known form.
        NotFinished: another process delivers for this run.
    """

    def __init__(self, setup: TrackerSetup) -> None:
        check_uri(setup.uri)
        self._uri = setup.uri
        self._term = -1
        self._term_lock = threading.Lock()
        self._outbox = _open_outbox(Path(setup.directory))
        self._outbox.withdraw_finish()  # whoever starts a tracker has a run that goes on, or says again how it ended
        self._publisher = publisher_of(setup, self._outbox)

    def position(self) -> int:
        """The newest step up to which the values of every step were published; -1 before any."""
        return self._outbox.position

    def publish(
        self, term: int, points: Sequence[MetricPoint], after: int | None = None, loads: Mapping[int, Loads] = {}
    ) -> None:
        """Take values. Of each metric, steps not newer than its newest one are dropped as repeats.

        Args:
            after: the points are all those of the steps after this one.
            loads: by step, those of its experts, where a heat map shows them.

        Raises:
            ProtocolError: steps before those are missing; see `position`. Nothing was taken.
            TermSuperseded: a controller with a higher term has published here. The same holds for all below.
        """
        self._admit(term)
        self._outbox.put_points(points, after, loads)
        self._publisher.wake()

    def event(self, term: int, entry: JournalEntry, points: Sequence[MetricPoint] = ()) -> None:
        """Take an event of the journal, with values that follow from it; a repeat, told by its `seq`, is dropped.

        Of kinds `checkpoint`, `checkpoints_deleted` and `resumed` the tracker makes what MLflow knows of models.
        """
        self._admit(term)
        self._outbox.put_event(entry, points)
        self._publisher.wake()

    def inputs(self, term: int, datasets: Sequence[Dataset]) -> None:
        """Take what the run is trained on and validated with."""
        self._admit(term)
        self._outbox.put([Inputs(tuple(datasets))])
        self._publisher.wake()

    def artifact(self, term: int, path: str) -> None:
        """Take the name of a file or directory, to be copied later. Raises NotFound if there is none."""
        self._admit(term)
        if not Path(path).exists():
            raise NotFound(f"artifact {path} does not exist", unchanged="Nothing was published.")
        self._outbox.put([Artifact(path)])
        self._publisher.wake()

    def finish(self, term: int, outcome: str, reason: str = "", timeout_s: float = 30.0) -> bool:
        """Send everything, then mark the run as ended. Waits; a tracker that fails is given up after `timeout_s`.

        Args:
            outcome: an `Outcome`: succeeded, failed, cancelled, paused.

        Returns:
            whether everything has arrived; if not, `describe` says why, and it is still being tried.
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
            position=self._outbox.position,
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
    """A publisher to MLflow, which is imported by its thread: that takes 2 s, and who makes one doesn't wait for it."""
    directory = Path(setup.directory)

    def connect() -> Sink:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # The publisher repeats what failed. MLflow's own repeats would hide for minutes that nobody answers.
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
    """The outbox; one that is damaged is set aside, and the controller publishes what its journal knows anew."""
    try:
        return Outbox(directory)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # the disk, not the file
            raise
        damaged = (directory / FILE).rename(directory / f"{FILE}.damaged")
        logger.error("the outbox can't be read: %s; it is kept as %s", error, damaged)
        (directory / f"{FILE}-journal").unlink(missing_ok=True)
        return Outbox(directory)
