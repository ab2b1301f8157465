"""The queue before a tracker: order, one value per step, growing pauses, a bound — with a sink that can be broken."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.tracking.publisher import Artifact, Event, Finish, Pace, Publisher
from orchestrator.tracking.sink import MetricPoint, Outcome, RunInfo

FAST = Pace(flush_s=0.01, idle_s=0.05, retry_s=0.001, retry_max_s=0.01)
NEVER_BY_TIME = Pace(flush_s=60.0, idle_s=60.0, flush_points=3)
DEADLINE_S = 10.0


class MemorySink:
    """Keeps what it takes. The first `failures` calls raise; `gate` holds every call up until it is set."""

    url = "memory:"
    tracked_id = "m1"

    def __init__(self, failures: int = 0, newest: Mapping[str, int] | None = None) -> None:
        self.log: list[object] = []
        self.calls = 0
        self.failures = failures
        self.newest = dict(newest or {})
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.took_points = threading.Event()

    def _call(self) -> None:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(f"tracker away, call {self.calls}")

    def start(self, run: RunInfo) -> None:
        self._call()

    def newest_steps(self) -> Mapping[str, int]:
        return self.newest

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        self._call()
        self.log.extend((point.name, point.step, point.value) for point in points)
        self.took_points.set()

    def log_artifact(self, path: Path) -> None:
        self._call()
        self.log.append(path.name)

    def log_event(self, event: Mapping[str, object]) -> None:
        self._call()
        self.log.append(dict(event))

    def flush(self) -> None:
        pass

    def finish(self, outcome: Outcome, reason: str) -> None:
        self._call()
        self.log.append((outcome, reason))


def publisher(sink: MemorySink, pace: Pace = FAST) -> Publisher:
    return Publisher(lambda: sink, RunInfo("r", "r"), pace)


def points(name: str, steps: Sequence[int], value: float = 1.0) -> list[MetricPoint]:
    return [MetricPoint(name, value, step, time=float(step)) for step in steps]


def finish(to: Publisher) -> None:
    end = Finish(Outcome.SUCCEEDED, "")
    to.put([end])
    assert end.delivered.wait(DEADLINE_S)


def test_everything_arrives_in_order(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: demo")
    sink = MemorySink()
    to = publisher(sink)
    to.put(points("train/loss", [0, 1]))
    to.put([Event({"event": "activated"}), *points("train/loss", [2]), Artifact(tmp_path / "job.yaml")])
    finish(to)
    assert sink.log == [
        ("train/loss", 0, 1.0),
        ("train/loss", 1, 1.0),
        {"event": "activated"},
        ("train/loss", 2, 1.0),
        "job.yaml",
        (Outcome.SUCCEEDED, ""),
    ]
    assert (to.state().queued, to.state().published, to.state().error) == (0, 3, "")


def test_a_replayed_step_keeps_its_first_value() -> None:
    sink = MemorySink(newest={"train/loss": 4})  # what a tracker before this one has published
    to = publisher(sink)
    to.put(points("train/loss", [3, 4, 5, 6, 5, 6], value=1.0))
    to.put(points("eval/loss", [4]))
    finish(to)
    to.put(points("train/loss", [6, 7], value=2.0))
    finish(to)
    assert [entry for entry in sink.log if entry[0] != Outcome.SUCCEEDED] == [  # type: ignore[index]
        ("train/loss", 5, 1.0),
        ("train/loss", 6, 1.0),
        ("eval/loss", 4, 1.0),
        ("train/loss", 7, 2.0),
    ]


def test_a_full_batch_is_sent_before_its_time() -> None:
    sink = MemorySink()
    to = publisher(sink, NEVER_BY_TIME)
    to.put(points("train/loss", [0, 1, 2]))
    assert sink.took_points.wait(DEADLINE_S)


@pytest.mark.parametrize("failures", [1, 2, 7])
def test_a_failing_tracker_is_tried_until_it_takes_everything_once(failures: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    sink = MemorySink(failures)
    to = publisher(sink)
    to.put([*points("train/loss", [0, 1]), Event({"n": 1}), Artifact(tmp_path / "f"), *points("train/loss", [2])])
    finish(to)
    assert sink.log == [
        ("train/loss", 0, 1.0),
        ("train/loss", 1, 1.0),
        {"n": 1},
        "f",
        ("train/loss", 2, 1.0),
        (Outcome.SUCCEEDED, ""),
    ]


def test_a_sink_that_can_not_be_made_is_tried_again() -> None:
    sink = MemorySink()
    attempts: list[int] = []

    def connect() -> MemorySink:
        attempts.append(len(attempts))
        if len(attempts) < 4:
            raise OSError("no such host")
        return sink

    to = Publisher(connect, RunInfo("r", "r"), FAST)
    finish(to)
    assert len(attempts) == 4


def test_the_failure_is_described_until_it_is_over() -> None:
    failed = threading.Event()
    seen: list[str] = []
    sink = MemorySink()

    def connect() -> MemorySink:
        if not failed.is_set():
            failed.set()
            raise OSError("no such host")
        seen.append(to.state().error)
        return sink

    # The pause is a minute: only the end of the run makes the thread try at once.
    to = Publisher(connect, RunInfo("r", "r"), Pace(retry_s=60.0))
    assert failed.wait(DEADLINE_S)
    finish(to)
    assert seen == ["OSError: no such host"]
    wait_until(lambda: to.state().error == "")


def test_a_blocked_tracker_blocks_nobody_and_the_queue_is_bounded() -> None:
    sink = MemorySink()
    sink.gate.clear()
    to = publisher(sink, Pace(flush_s=0.01, capacity=10))
    assert sink.entered.wait(DEADLINE_S)
    to.put(points("train/loss", range(25)))
    to.put([Event({"kept": "though full"})])
    assert (to.state().queued, to.state().dropped) == (11, 15)
    sink.gate.set()
    finish(to)
    assert [entry[1] for entry in sink.log[:10]] == list(range(10))  # type: ignore[index]
    assert sink.log[10] == {"kept": "though full"}


def test_an_artifact_that_vanished_does_not_hold_the_others_up(tmp_path: Path) -> None:
    sink = MemorySink()
    to = publisher(sink)
    to.put([Artifact(tmp_path / "gone"), *points("train/loss", [0])])
    finish(to)
    assert sink.log == [("train/loss", 0, 1.0), (Outcome.SUCCEEDED, "")]


def wait_until(condition: Callable[[], bool]) -> None:
    ticks = threading.Event()
    for _ in range(int(DEADLINE_S / 0.01)):
        if condition():
            return
        ticks.wait(0.01)
    raise AssertionError("the condition never came true")
