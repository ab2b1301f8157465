"""Periodic readings of nodes and of energy, for the controller's inbox.

`Monitors` holds the two watches of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayError

from orchestrator.cluster.actors import Host
from orchestrator.cluster.inbox import Inbox, post
from orchestrator.cluster.remote import Remote
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.controller.startup import OpenedRun
from orchestrator.protocol.events.workers import EnergyRead
from orchestrator.protocol.usage import EnergyReading
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.storage.tasks import StorageTask
from orchestrator.telemetry.node import Reading, points_of_readings
from orchestrator.tracking.sinks.sink import MetricPoint

NODES_EVERY_S = 10.0


# -- Load of nodes ---------


class NodeWatch:
    """Polls the load of a run's nodes.

    Args:
        show: gets the metric values since a node's previous reading.
    """

    def __init__(self, run: OpenedRun, inbox: Inbox, show: Callable[[Sequence[MetricPoint]], None]) -> None:
        self._memory, self._inbox, self._show = run.memory, inbox, show
        # Of a bucket there is no usage: a node's own disk holds what is copied from there.
        self._directory = str(run.run_dir) if isinstance(run.run_dir, Path) else "/"
        self._asked_s: float | None = None
        self._nodes: dict[str, str] = {}  # worker -> node
        self._readings: dict[str, Reading] = {}  # the newest of each node
        self._open: set[str] = set()  # workers that haven't answered: their file system may hang

    def poll(self, now_s: float, handles: Mapping[str, Remote[Host]]) -> None:
        """If it is time, ask every worker whose node is not known yet, and one worker of every known node."""
        if self._asked_s is not None and now_s - self._asked_s < NODES_EVERY_S:
            return
        self._asked_s = now_s
        self._nodes = {worker: node for worker, node in self._nodes.items() if worker in handles}
        readers = {node: worker for worker, node in reversed(self._nodes.items())}
        for worker, host in handles.items():
            is_due = worker not in self._nodes or readers[self._nodes[worker]] == worker
            if is_due and worker not in self._open:
                self._open.add(worker)
                post(self._inbox, host.send(Host.read_system, self._directory), partial(self._take, worker))

    def _take(self, worker: str, answer: "Future[Reading]") -> None:
        """Show a node's load. A failed worker has none, and is handled elsewhere."""
        self._open.discard(worker)
        if answer.exception() is not None:
            return
        reading, step = answer.result(), self._memory.progress.watermark
        self._nodes[worker] = reading.node
        before = self._readings.get(reading.node)
        self._readings[reading.node] = reading
        if before is not None and step >= 0:
            self._show(list(points_of_readings(before, reading, step)))


# -- Energy used by workers, polled and journalled ---------------------------------------------------------------------

ENERGY_EVERY_S = 10.0
WRITE_EVERY_S = 30.0
LAST_S = 1.0  # how long a run that has ended waits for its workers' last readings


class EnergyWatch:
    """Energy of one run.

    Args:
        gpus: number that each worker reserves.
    """

    def __init__(self, gpus: float, memory: JournaledRun, storage: StorageThread, inbox: Inbox) -> None:
        self._gpus, self._memory, self._storage, self._inbox = gpus, memory, storage, inbox
        self._asked_s: dict[str, float] = {}
        self._written_s = 0.0
        self._known: dict[str, EnergyReading] = {}  # newest reading of each worker
        self._news: dict[str, EnergyReading] = {}  # those not yet in the journal

    def poll(self, now_s: float, handles: Mapping[str, Remote[Host]]) -> None:
        """Ask the workers that are due, and journal new readings."""
        for worker, host in handles.items():
            if now_s - self._asked_s.get(worker, float("-inf")) >= ENERGY_EVERY_S:
                self._asked_s[worker] = now_s
                post(self._inbox, host.send(Host.read_energy, self._gpus), partial(self._take, worker))
        if self._news and now_s - self._written_s >= WRITE_EVERY_S:
            self._written_s = now_s
            self._storage.add("energy", self._write, Lane.DECISIONS)

    def _take(self, worker: str, answer: "Future[EnergyReading]") -> None:
        """Note a worker's reading. A failed worker has none, and is handled elsewhere."""
        if answer.exception() is None:
            self._enter(worker, answer.result())

    def close(self, handles: Mapping[str, Remote[Host]]) -> None:
        """Ask workers with earlier readings once more, before they are ended, and journal the answers."""
        asked = {handles[w].send(Host.read_energy, self._gpus): w for w in self._known.keys() & handles.keys()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LAST_S) if asked else ([], [])
        for ref in answered:
            with suppress(RayError):
                self._enter(asked[ref], ray.get(ref))
        if self._news:
            self._storage.add("energy", self._write, Lane.DECISIONS)

    def _enter(self, worker: str, reading: EnergyReading) -> None:
        if reading.is_measured:
            self._known[worker] = self._news[worker] = reading

    def _write(self) -> StorageTask[None]:
        news = dict(self._news)
        yield from self._memory.note(EnergyRead(news))
        self._news = {worker: read for worker, read in self._news.items() if news.get(worker) is not read}


# -- All of them ---------


class Monitors:
    """The watches of one run.

    Args:
        show: gets metric values of its nodes.
    """

    def __init__(
        self, run: OpenedRun, storage: StorageThread, inbox: Inbox, show: Callable[[Sequence[MetricPoint]], None]
    ) -> None:
        self._nodes = NodeWatch(run, inbox, show)
        self._energy = EnergyWatch(run.job.resources.num_gpus, run.memory, storage, inbox)

    def poll(self, now_s: float, handles: Mapping[str, Remote[Host]]) -> None:
        """Ask the workers for the readings that are due."""
        self._nodes.poll(now_s, handles)
        self._energy.poll(now_s, handles)

    def close(self, handles: Mapping[str, Remote[Host]]) -> None:
        """Read the workers' energy once more, before they are ended."""
        self._energy.close(handles)
