"""TensorBoard sink: event files in a folder, `tensorboard --logdir FOLDER`. Importing it takes half a second."""

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from orchestrator.tracking.sinks.sink import Finish, MetricPoint, RunInfo
from orchestrator.tracking.sinks.values_sink import ValuesSink

JOB = "job"  # tag of the run's parameters


class TensorBoardSink(ValuesSink):
    """A `Sink` that begins a new event file with each start of the tracker, as TensorBoard wants it."""

    tracked_id = ""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._file: EventFileWriter | None = None

    @property
    def url(self) -> str:
        return str(self._directory)

    def start(self, run: RunInfo) -> None:
        """Begin a file. What earlier ones hold is not written again; a record that was cut off ends its file."""
        found = sorted(self._directory.glob("events.out.tfevents.*"))
        for file in found:
            for event in LegacyEventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    self.newest[value.tag] = max(event.step, self.newest.get(value.tag, -1))
        self._file = EventFileWriter(str(self._directory))
        if not found:
            rows = [f"| {name} | {value} |" for name, value in run.params.items()]
            table = "\n".join(["| key | value |", "|---|---|", *rows])
            self._file.add_event(Event(step=0, summary=text_pb(JOB, table)))
            self._file.flush()

    def write(self, points: Sequence[MetricPoint]) -> None:
        assert self._file is not None, "start was not called"
        for point in points:
            values = [Summary.Value(tag=point.key, simple_value=point.value)]
            self._file.add_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self._file.flush()

    def finish(self, end: Finish) -> None:
        """Nothing: TensorBoard knows no end of a run."""
