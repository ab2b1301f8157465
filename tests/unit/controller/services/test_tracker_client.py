"""Publication to a tracker that was away, from the journal alone."""

import os
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from orchestrator.cluster.remote import Remote
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.services import tracker_client
from orchestrator.controller.services.tracker_client import START_AGAIN_S, TrackerClient
from orchestrator.policy.health.expert_load import is_shown
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Rescaled
from orchestrator.protocol.events.run import Submitted
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.run_history import RunHistory
from orchestrator.run_records.tracker_setup import tracker_setup
from orchestrator.run_records.tracking_sync import POINTS_PER_CALL, Call, missing_calls
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import run_inline
from orchestrator.telemetry.node import Reading, points_of_readings, read_system
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.sinks.sink import Dataset, MetricPoint, TrackerPosition
from orchestrator.tracking.tracker import Tracker
from tests.unit.policy.imagined import limits_of, record

STEPS = 500
LOADS = ((3, 1), (0, 4))  # of the experts
SHOWN = tuple(step for step in range(STEPS) if is_shown(step, STEPS))  # with loads in the journal
DATA = PreparedData("/store", 300, "/run/tokenizer.json", (Dataset("t/train", "train", "abc", "/t", 1, 2),))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    memory = JournaledRun(tmp_path, limits_of(steps=STEPS))
    run_inline(memory.note(Submitted("run", 2)))
    run_inline(memory.absorb([record(step, loads=LOADS) for step in range(STEPS)], up_to=10_000))
    run_inline(memory.note(Rescaled(1, 2, 3, step=40, why="", stall_s=0.3, moved_bytes=7)))
    run_inline(memory.note(CheckpointCommitted(99, "/c/99", 0, "")))
    return tmp_path


def missing(run_dir: Path, position: TrackerPosition, data: PreparedData | None = None) -> list[Call]:
    progress = RunHistory(run_dir, limits_of(steps=STEPS)).progress
    return list(missing_calls(run_dir, position, progress, data))


@pytest.mark.parametrize("num_events", [0, 1, 3])
@pytest.mark.parametrize("position", [-1, 0, 123, STEPS - 2, STEPS - 1])
def test_a_tracker_gets_what_it_lacks_and_every_step_once(run_dir: Path, position: int, num_events: int) -> None:
    outbox = Outbox(run_dir / "tracking")
    everything = missing(run_dir, TrackerPosition())
    have = [point for method, args in everything if method is Tracker.publish for point in args[0]]
    known = {step: LOADS for step in SHOWN if step <= position}
    outbox.put_points([point for point in have if point.step <= position], after=-1, loads=known)
    events = [args for method, args in everything if method is Tracker.event]
    for args in events[:num_events]:
        outbox.put_event(*args)
    calls = missing(run_dir, outbox.position, DATA)
    assert len([method for method, _ in calls if method is Tracker.event]) == 3 - num_events
    for method, args in [*calls, *missing(run_dir, outbox.position, DATA)]:
        if method is Tracker.publish:
            assert len(args[0]) <= POINTS_PER_CALL + 20
            outbox.put_points(*args)
        elif method is Tracker.event:
            outbox.put_event(*args)
    history = outbox.history()
    assert outbox.position.step == STEPS - 1
    assert [method for method, _ in missing(run_dir, outbox.position)] == [Tracker.artifact]
    assert [step for step, _ in history.curves["train/loss"]] == list(range(STEPS))
    assert [event.kind for event in history.events] == ["submitted", "rescaled", "checkpoint"]
    assert history.loads == {step: [[3, 1], [0, 4]] for step in SHOWN}
    assert outbox.num_waiting == len(have) + 2 + 1  # the cost of the rescale, and the checkpoint


@dataclass
class SentCalls:
    """In place of a tracker's handle: what it was called with."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def call(self) -> "SentCalls":
        return self

    def remote(self, *call: Any) -> "SentCalls":
        self.calls.append(call)
        return self

    def future(self) -> "Future[None]":
        return Future()


def _has_steps_up_to(step: int) -> "Future[Any]":
    answer: Future[TrackerPosition] = Future()
    answer.set_result(TrackerPosition(step))
    return answer


def test_a_journal_that_cannot_be_read_for_a_while_is_read_again(run_dir: Path) -> None:
    storage = StorageThread(SimpleQueue())
    link = TrackerClient("run", run_dir, JobSpec(name="run"), "package:Tracker", 1, storage, SimpleQueue())
    tracker = SentCalls()
    link._tracker = Remote(tracker, is_hosted=True)
    path = max((run_dir / "journal").iterdir())
    away = path.rename(run_dir / "away")
    path.mkdir()
    link._take(link._tracker, Tracker.position, _has_steps_up_to(-1))
    storage.finish()
    assert link.warning == "metrics wait in the journal, which can't be read: Is a directory"
    assert "publish" not in [method for method, *_ in tracker.calls]
    path.rmdir()
    away.rename(path)
    link._num_open = 0  # what it was sent is answered
    link.tend(now_s=10.0)
    assert tracker.calls[-1] == ("position",)
    link._take(link._tracker, Tracker.position, _has_steps_up_to(-1))
    storage.finish()
    assert link.warning is None
    steps = [point.step for method, *args in tracker.calls if method == "publish" for point in args[1]]
    assert set(steps) == set(range(STEPS))


def test_a_tracker_that_could_not_be_started_is_started_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is killed while its outbox can't be written: Ray restarts no actor that raised while it started."""
    started: list[Remote[Any]] = []

    def start_host(*_: Any) -> Any:
        started.append(Remote(SentCalls(), is_hosted=True))
        return SimpleNamespace(hosted=lambda: started[-1])

    monkeypatch.setattr(tracker_client, "start_host", start_host)
    link = TrackerClient(
        "run", run_dir, JobSpec(name="run"), "package:Tracker", 1, StorageThread(SimpleQueue()), SimpleQueue()
    )
    first = link.start()
    unavailable, died = Future[Any](), Future[Any]()
    unavailable.set_exception(ActorUnavailableError("restarting", None))
    died.set_exception(ActorDiedError())
    link._take(first, Tracker.describe, unavailable)
    link.tend(time.monotonic() + START_AGAIN_S)
    assert len(started) == 1  # Ray is restarting it
    link._take(first, Tracker.describe, died)
    link.tend(time.monotonic() + START_AGAIN_S / 2)
    assert link.start() is first  # not at once: it may take a while until its outbox can be written
    link.tend(time.monotonic() + START_AGAIN_S)
    assert len(started) == 2 and link.start() is started[1]
    link._take(first, Tracker.describe, died)  # of a call that was open
    link.tend(time.monotonic() + 2 * START_AGAIN_S)
    assert len(started) == 2


@dataclass
class BusyTracker:
    """A tracker whose delivery arrives with the last of `answers`, each of an end that it was asked for."""

    answers: list[bool]
    error: str = ""
    ends: int = 0

    def within(self, _: float) -> "BusyTracker":
        return self

    def ask(self, method: Any, *_: Any) -> Any:
        if method is Tracker.position:
            return TrackerPosition(STEPS)
        if method is Tracker.finish:
            self.ends += 1
            return self.answers[self.ends - 1]
        return {"url": "", "waiting": 1, "position": STEPS, "error": self.error} if method is Tracker.describe else None


@pytest.mark.parametrize(
    ("register_as", "error", "ends"), [("books", "", 3), ("books", "no server answers", 1), (None, "", 1)]
)
def test_the_end_waits_for_a_model_that_is_being_written(
    run_dir: Path, register_as: str | None, error: str, ends: int
) -> None:
    job = JobSpec.model_validate({"name": "run", "tracking": {"register_as": register_as}})
    link = TrackerClient("run", run_dir, job, "package:Tracker", 1, StorageThread(SimpleQueue()), SimpleQueue())
    tracker: Any = BusyTracker([False, False, True], error)
    link._tracker = tracker
    link.close("succeeded", "", STEPS)
    assert tracker.ends == ends
    assert (link.warning is None) == (ends == 3)


def test_files_and_data_are_published_too(run_dir: Path) -> None:
    told = [
        (method, args)
        for method, args in missing(run_dir, TrackerPosition(STEPS), DATA)
        if method in (Tracker.artifact, Tracker.inputs)
    ]
    job = str(run_dir / "job.yaml")
    assert told == [
        (Tracker.artifact, (job,)),
        (Tracker.artifact, ("/run/tokenizer.json",)),
        (Tracker.inputs, (DATA.datasets,)),
    ]


def test_parameters_hold_no_password() -> None:
    job = JobSpec.model_validate({"name": "try", "tracking": {"uri": "postgresql://me:secret@host/db"}})
    setup = tracker_setup("try", Path("/runs/try"), job)
    assert setup.run.params["tracking.uri"] == "postgresql://me:***@host/db"
    assert setup.uri == "postgresql://me:secret@host/db"
    assert (setup.directory, setup.artifacts) == ("/runs/try/tracking", "/runs/mlflow-artifacts")
    assert setup.run.params["train.max_steps"] == str(job.train.max_steps)


def test_node_metrics_are_rates_between_two_readings() -> None:
    before = Reading("10.0.0.7", 100.0, 50.0, 1000.0, 5, 40.0, 1_000, 2_000)
    after = Reading("10.0.0.7", 110.0, 65.0, 1020.0, 7, 41.0, 6_000, 2_500)
    values = {point.key: point.value for point in points_of_readings(before, after, step=9)}
    assert values == {
        "system/cpu_percent/10.0.0.7": 75.0,
        "system/memory_bytes/10.0.0.7": 7.0,
        "system/disk_percent/10.0.0.7": 41.0,
        "system/sent_bytes_per_second/10.0.0.7": 500.0,
        "system/received_bytes_per_second/10.0.0.7": 50.0,
    }
    assert list(points_of_readings(before, before, step=9)) == []


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    first = read_system("here", str(tmp_path))
    sum(n * n for n in range(200_000))
    second = read_system("here", str(tmp_path))
    rounding = 1e-6  # each is a sum of numbers in hundredths
    assert -rounding <= second.busy_s - first.busy_s <= second.total_s - first.total_s + rounding
    assert second.total_s - first.total_s <= (second.time - first.time + 1.0) * (os.cpu_count() or 1)
    assert second.memory_bytes > 0 and 0 < second.disk_percent <= 100


@pytest.mark.parametrize("when", ["while the journal is read", "before, and only kept in the cluster"])
def test_what_is_published_to_a_tracker_that_lacks_something_is_not_missed(run_dir: Path, when: str) -> None:
    storage = StorageThread(SimpleQueue())
    link = TrackerClient("run", run_dir, JobSpec(name="run"), "package:Tracker", 1, storage, SimpleQueue())
    tracker = SentCalls()
    link._tracker = Remote(tracker, is_hosted=True)
    entry = JournalEntry(10_000, 1, 0.0, CheckpointCommitted(199, "/c/199", 0, ""))
    if when.startswith("before"):
        link.publish_event(entry)
    link._take(link._tracker, Tracker.position, _has_steps_up_to(-1))
    storage.advance()  # it is being read
    if when.startswith("while"):
        link.publish_event(entry)
        link.publish_steps([MetricPoint("train/loss", 1.0, STEPS, 0.0)], after=STEPS - 1, loads={})
    storage.finish()
    *_, before, (_, _, sent, _, after) = [call for call in tracker.calls if call[0] == "event"]
    assert sent == entry and after == before[2].seq
    steps = [(args[-2], args[1][0].step) for method, *args in tracker.calls if method == "publish"]
    assert ((STEPS - 1, STEPS) in steps) == when.startswith("while")
    later = JournalEntry(10_002, 1, 0.0, CheckpointCommitted(299, "/c/299", 0, ""))
    link.publish_event(later)
    assert tracker.calls[-1][2] == later and tracker.calls[-1][-1] == entry.seq
