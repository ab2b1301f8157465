"""From the outbox to a tracker: order, growing pauses, nothing lost — with a sink that can be broken."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.tracking.history import History
from orchestrator.tracking.outbox import Outbox
from orchestrator.tracking.publisher import Pace, Publisher, Reporting
from orchestrator.tracking.sinks.sink import (
    Artifact,
    Checkpoint,
    CheckpointMark,
    Dataset,
    Finish,
    MetricPoint,
    Outcome,
    RunInfo,
)

FAST = Pace(flush_s=0.01, retry_s=0.001, retry_max_s=0.01)
DEADLINE_S = 60.0


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

    def _call(self, *entries: object) -> None:
        self.entered.set()
        assert self.gate.wait(DEADLINE_S)
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(f"tracker away, call {self.calls}")
        self.log.extend(entries)

    def start(self, run: RunInfo) -> None:
        self._call()

    def newest_steps(self) -> Mapping[str, int]:
        return self.newest

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        self._call(*((point.name, point.step, point.value) for point in points))

    def log_artifact(self, path: Path) -> None:
        self._call(path.name)

    def log_table(self, path: Path) -> None:
        self._call(path.name)

    def log_inputs(self, datasets: Sequence[Dataset]) -> None:
        self._call(*datasets)

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._call(checkpoint)

    def mark_checkpoints(self, mark: CheckpointMark) -> None:
        self._call(mark)

    def finish(self, end: Finish) -> None:
        self._call(end)


class Scene:
    """A publisher between an outbox and a sink."""

    def __init__(self, directory: Path, sink: MemorySink, pace: Pace = FAST) -> None:
        self.outbox = Outbox(directory)
        self.publisher = self.over(self.outbox, lambda: sink, pace)

    @staticmethod
    def over(outbox: Outbox, connect: Callable[[], MemorySink], pace: Pace = FAST) -> Publisher:
        def table(history: History) -> Path:
            return Path(f"table-{len(history.events)}")

        def charts(history: History) -> list[Path]:
            return [Path(f"chart-{len(history.curves['train/loss'])}")]

        return Publisher(outbox, connect, RunInfo("r", "r"), Reporting(table, charts), str, pace)

    def finish(self) -> None:
        self.outbox.put_finish(Finish(Outcome.SUCCEEDED, ""))
        self.publisher.wake(hurry=True)
        assert self.publisher.wait(DEADLINE_S)


END = Finish(Outcome.SUCCEEDED, "")


def points(name: str, steps: Sequence[int], value: float = 1.0) -> list[MetricPoint]:
    return [MetricPoint(name, value, step, time=float(step)) for step in steps]


@pytest.mark.parametrize("failures", [0, 1, 2, 7])
def test_everything_arrives_once_and_in_order(failures: int, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: demo")
    sink = MemorySink(failures)
    scene = Scene(tmp_path, sink)
    scene.outbox.put_points(points("train/loss", [0, 1]), after=-1)
    scene.outbox.put([Artifact(str(tmp_path / "job.yaml")), Artifact(str(tmp_path / "gone"))])
    scene.outbox.put_event(JournalEntry(0, 1, 0.0, CheckpointCommitted(1, "/c", 0, "")))
    scene.finish()
    loss = MetricPoint("train/loss", 1.0, 1, 1.0)
    told = [("train/loss", 0, 1.0), ("train/loss", 1, 1.0), "job.yaml", Checkpoint(0, 1, "/c", (loss,))]
    assert [entry for entry in sink.log if entry not in ("table-1", "chart-2")] == [*told, END]
    assert sink.log[-1] == END and {"table-1", "chart-2"} <= set(map(str, sink.log))
    state = scene.publisher.state()
    assert (state.waiting, state.published, state.error) == (0, 2, "")


def test_charts_that_can_not_be_drawn_hold_nothing_up(tmp_path: Path) -> None:
    def charts(history: History) -> list[Path]:
        raise RuntimeError("no fonts")

    sink, outbox = MemorySink(), Outbox(tmp_path)
    publisher = Publisher(
        outbox, lambda: sink, RunInfo("r", "r"), Reporting(lambda history: Path("table"), charts), str, FAST
    )
    outbox.put_points(points("train/loss", [0]), after=-1)
    outbox.put_finish(END)
    publisher.wake(hurry=True)
    assert publisher.wait(DEADLINE_S)
    assert sink.log == [("train/loss", 0, 1.0), END]


def test_what_was_sent_before_a_crash_is_sent_again_to_the_last_bit(tmp_path: Path) -> None:
    """Between the tracker's yes and our note of it: MLflow takes two values that are equal in everything as one."""
    first, second = MemorySink(), MemorySink()
    outbox = Outbox(tmp_path)
    outbox.put_points([MetricPoint("train/loss", 0.1 + 0.2, 0, time=1.7e9 + 1 / 3)], after=-1)
    number, items = outbox.head(10)
    first.log_metrics([item for item in items if isinstance(item, MetricPoint)])
    outbox.close()  # and no `remove`
    scene = Scene(tmp_path, second)
    scene.finish()
    assert second.log[: len(first.log)] == first.log and number > 0


def test_a_sink_that_can_not_be_opened_is_retried_and_reported(tmp_path: Path) -> None:
    failed = threading.Event()
    seen: list[str] = []
    sink = MemorySink()

    def connect() -> MemorySink:
        if not failed.is_set():
            failed.set()
            raise OSError("no such host")
        seen.append(publisher.state().error)
        return sink

    outbox = Outbox(tmp_path)
    # The pause is ten minutes: only the end of the run makes the thread try at once.
    publisher = Scene.over(outbox, connect, Pace(retry_s=600.0))
    assert failed.wait(DEADLINE_S)
    outbox.put_finish(END)
    publisher.wake(hurry=True)
    assert publisher.wait(DEADLINE_S)
    assert (seen, publisher.state().error, sink.log[-1]) == (["no such host"], "", END)


def test_a_blocked_tracker_blocks_no_run_and_loses_nothing(tmp_path: Path) -> None:
    sink = MemorySink()
    sink.gate.clear()
    scene = Scene(tmp_path, sink, Pace(flush_s=0.01, batch=100))
    assert sink.entered.wait(DEADLINE_S)
    scene.outbox.put_points(points("train/loss", range(2500)), after=-1)
    assert scene.publisher.state().waiting == 2500
    assert not scene.publisher.wait(0.05)
    sink.gate.set()
    scene.finish()
    assert [entry[1] for entry in sink.log if isinstance(entry, tuple)] == list(range(2500))
