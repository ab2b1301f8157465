"""Now and then asks one process of the run on each node how busy its node is."""

from collections.abc import Mapping
from pathlib import Path

from orchestrator.cluster.actors import Handle
from orchestrator.controller.worker_group import Answer, Inbox, post
from orchestrator.telemetry.node import Reading, points_of_readings
from orchestrator.tracking.sink import MetricPoint

EVERY_S = 10.0


class NodeWatch:
    """Answers come into the controller's inbox with the method `READ`."""

    READ = "read_system"

    def __init__(self, run_dir: Path, inbox: Inbox) -> None:
        self._directory, self._inbox = str(run_dir), inbox
        self._asked_s: float | None = None
        self._nodes: dict[str, str] = {}  # worker -> node
        self._readings: dict[str, Reading] = {}  # the newest of each node

    def poll(self, now_s: float, handles: Mapping[str, Handle]) -> None:
        """Ask, if it is time: whoever's node isn't known yet, and one worker of every other node."""
        if self._asked_s is not None and now_s - self._asked_s < EVERY_S:
            return
        self._asked_s = now_s
        self._nodes = {worker: node for worker, node in self._nodes.items() if worker in handles}
        speakers = {node: worker for worker, node in reversed(self._nodes.items())}
        for worker, handle in handles.items():
            if worker not in self._nodes or speakers[self._nodes[worker]] == worker:
                post(self._inbox, worker, NodeWatch.READ, handle.read_system.remote(self._directory))

    def take(self, answer: Answer, step: int) -> list[MetricPoint]:
        """Values since the node's reading before, at `step`. None of a worker that is gone: others see to that."""
        if answer.future.exception() is not None:
            return []
        reading: Reading = answer.future.result()
        self._nodes[answer.of] = reading.node
        before = self._readings.get(reading.node)
        self._readings[reading.node] = reading
        return list(points_of_readings(before, reading, step)) if before is not None and step >= 0 else []
