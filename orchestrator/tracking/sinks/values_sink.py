"""Base of sinks that take a run's metric values and its end, and no files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.tracking.sinks.sink import Checkpoint, CheckpointMark, Dataset, MetricPoint


class ValuesSink:
    """The part of a `Sink` that values alone need. A subclass writes them in `write` and fills `newest` in `start`."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}  # step of the newest value that was written, by the metric's key

    def newest_steps(self) -> Mapping[str, int]:
        return dict(self.newest)

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Write values. Repeats, those of a metric's newest step or older, are dropped."""
        fresh = [point for point in points if point.step > self.newest.get(point.key, -1)]
        if fresh:
            self.write(fresh)
            self.newest |= {point.key: point.step for point in fresh}

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Write new values; they outlive this process once this returns."""
        raise NotImplementedError

    def log_artifact(self, path: Path) -> None: ...

    def log_table(self, path: Path) -> None: ...

    def log_inputs(self, datasets: Sequence[Dataset]) -> None: ...

    def log_checkpoint(self, checkpoint: Checkpoint) -> None: ...

    def mark_checkpoints(self, mark: CheckpointMark) -> None: ...
