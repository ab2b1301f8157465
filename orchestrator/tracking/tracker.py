"""The tracker of one run: a plain class for a process of its own, called by the run's controller.

    tracker = Tracker(TrackerSetup(uri="sqlite:////runs/mlflow.db", experiment="demo", run=RunInfo("r1", "r1"),
                                   directory="/runs/r1/tracking", artifacts="/runs/mlflow-artifacts"))
    tracker.publish(term, [MetricPoint("train/loss", 2.5, step=0, time=time.time())], after=-1)
    tracker.finish(term, "succeeded")

Training never waits for it, and failures of MLflow never raise. Items are on disk when a method returns. MLflow and
each sink beside it have an outbox and a thread of their own, so none waits for another.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from orchestrator.errors import NotFound, TermSuperseded
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.training import ExpertsRebalanced
from orchestrator.protocol.expert_load import Loads
from orchestrator.storage.atomic import make_folders
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import location_of, objects_at
from orchestrator.tracking.history import History, write_table
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.outbox_file import FILE
from orchestrator.tracking.publisher import Publisher, Reporting
from orchestrator.tracking.sinks.open_sink import MLFLOW, explain, open_sink, outbox_directory
from orchestrator.tracking.sinks.sink import (
    Artifact,
    Dataset,
    Finish,
    Inputs,
    MetricPoint,
    Outcome,
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
    waiting: int  # items on disk that MLflow or another sink has not taken yet
    published: int  # metric values that this process has sent to MLflow
    error: str  # the newest failures; empty once all sinks take items again


@dataclass(frozen=True)
class Outlet:
    """A sink, by its thread, and what it has not taken yet."""

    name: str
    outbox: Outbox
    publisher: Publisher


class Tracker:
    """Publishes one run to its sinks. Thread-safe; every method but `finish` returns once the item is on disk.

    Raises:
        UsageError: the URI has no supported form.
        NotFinished: another process delivers for this run.
        OSError: run storage can't be written, or its file system isn't mounted.
    """

    def __init__(self, setup: TrackerSetup) -> None:
        check_uri(setup.uri)
        self._uri = setup.uri
        self._term = -1
        self._term_lock = threading.Lock()
        self._directory = Path(setup.directory)
        if setup.root:
            make_folders(Path(setup.root), self._directory)
        self._mlflow, *others = [_outlet(name, setup) for name in (MLFLOW, *setup.sinks)]
        self._outlets = (self._mlflow, *others)

    def position(self) -> TrackerPosition:
        """What was published without gaps, to the sink that has least."""
        positions = [outlet.outbox.position for outlet in self._outlets]
        return TrackerPosition(min(p.step for p in positions), min(p.event for p in positions))

    def publish(
        self, term: int, points: Sequence[MetricPoint], after: int | None = None, loads: Mapping[int, Loads] = {}
    ) -> None:
        """Take values. A metric's values for its newest step or older ones are dropped as repeats.

        Args:
            after: the points are those of all steps after this one.
            loads: expert loads by step, for steps that the heat map shows.

        Raises:
            ProtocolError: values of earlier steps are missing in an outbox; see `position`. It has taken nothing.
            TermSuperseded: a controller with a higher term has published here. The methods below raise it too.
        """
        self._put(term, lambda outbox: outbox.put_points(points, after, loads))

    def event(
        self, term: int, entry: JournalEntry, points: Sequence[MetricPoint] = (), after: int | None = None
    ) -> None:
        """Take an event of the journal, with values derived from it; an event with a known `seq` is dropped.

        Args:
            after: `seq` of the run's event before it. Raises ProtocolError, as `publish` does, if that is missing.

        Events `checkpoint`, `checkpoints_deleted` and `resumed` create and update models in MLflow.
        """
        self._put(term, lambda outbox: outbox.put_event(entry, points, after))

    def inputs(self, term: int, datasets: Sequence[Dataset]) -> None:
        """Take the datasets for training and validation."""
        self._put(term, lambda outbox: outbox.put([Inputs(tuple(datasets))]))

    def artifact(self, term: int, path: str) -> None:
        """Take the path of a file or directory, which is copied later, or the URL of an object, which is copied now.
        Raises NotFound if it doesn't exist, OSError if it can't be copied."""
        self._admit(term)
        place = location_of(path)
        file = place if isinstance(place, Path) else self._copy_of(place)
        if file is None or not file.exists():
            raise NotFound(f"artifact {path} does not exist", unchanged="Nothing was published.")
        self._put(term, lambda outbox: outbox.put([Artifact(str(file))]))

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
        end, deadline_s = Finish(Outcome(outcome), reason), time.monotonic() + timeout_s
        self._put(term, lambda outbox: outbox.put_finish(end), hurry=True)
        waits = [outlet.publisher.wait(max(0.0, deadline_s - time.monotonic())) for outlet in self._outlets]
        return all(waits)

    def describe(self) -> TrackerState:
        states = {outlet.name: outlet.publisher.state() for outlet in self._outlets}
        state = states[MLFLOW]
        errors = [
            each.error if name == MLFLOW else f"{name}: {each.error}" for name, each in states.items() if each.error
        ]
        return TrackerState(
            uri=redacted(self._uri),
            url=state.url,
            mlflow_run_id=state.tracked_id,
            term=self._term,
            position=self.position().step,
            waiting=sum(each.waiting for each in states.values()),
            published=state.published,
            error="; ".join(errors),
        )

    def _put(self, term: int, put: Callable[[Outbox], None], hurry: bool = False) -> None:
        """Put into all outboxes. After an error the caller repeats it, which changes nothing where it succeeded."""
        self._admit(term)
        for outlet in self._outlets:
            put(outlet.outbox)
            outlet.publisher.wake(hurry)

    def _admit(self, term: int) -> None:
        with self._term_lock:
            if term < self._term:
                raise TermSuperseded(
                    f"term {term} may not publish: term {self._term} does", unchanged="Nothing was published."
                )
            self._term = term


def _outlet(name: str, setup: TrackerSetup) -> Outlet:
    directory = outbox_directory(name, setup)
    outbox = _open_outbox(directory)
    outbox.withdraw_finish()  # the starting controller continues the run, or reports its end again

    def charts(history: History) -> Sequence[Path]:
        from orchestrator.tracking.charts import draw  # and with it matplotlib
        from orchestrator.tracking.load_chart import draw_loads

        name, moves = setup.run.name, [e.step + 1 for e in history.events if e.kind == ExpertsRebalanced.kind]
        return [*draw(history, name, directory), *draw_loads(history.loads, name, directory, moves)]

    reporting = Reporting(table=lambda history: write_table(history, directory), charts=charts)
    files = reporting if name == MLFLOW else None
    publisher = Publisher(
        outbox, partial(open_sink, name, setup), setup.run, files, lambda error: explain(name, setup, error)
    )
    return Outlet(name, outbox, publisher)


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
