"""Now and then asks each worker of a run what energy it has used, and journals what they say.

    energy    {"workers": {"w0": {"gpu_j": ..., "cpu_j": ...}}}     since each worker's beginning; the newest counts

Workers count on by themselves, so a controller that is away misses nothing of those that live. What a worker uses after
its last answer isn't known. Where nothing can be measured, nothing is written.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.cluster.actors import Handle
from orchestrator.controller.worker_group import Answer, Inbox, post
from orchestrator.errors import StorageError
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.energy import EnergyReading
from orchestrator.run_records.run_history import RunMemory

EVERY_S = 10.0
WRITE_EVERY_S = 30.0
LAST_S = 1.0  # how long a run that has ended waits for what its workers have used


class EnergyWatch:
    """Of one run. Answers come into the controller's inbox with the method `READ`.

    Args:
        gpus: that each worker reserves.
    """

    READ = "read_energy"

    def __init__(self, gpus: float, memory: RunMemory, inbox: Inbox) -> None:
        self._gpus, self._memory, self._inbox = gpus, memory, inbox
        self._asked_s: dict[str, float] = {}
        self._written_s = 0.0
        self._known: dict[str, EnergyReading] = {}  # what workers said last
        self._news: dict[str, EnergyReading] = {}  # of it, what isn't in the journal

    def poll(self, now_s: float, handles: Mapping[str, Handle]) -> None:
        """Ask whoever is due, and write down what has come since."""
        for worker, handle in handles.items():
            if now_s - self._asked_s.get(worker, float("-inf")) >= EVERY_S:
                self._asked_s[worker] = now_s
                post(self._inbox, worker, EnergyWatch.READ, handle.read_energy.remote(self._gpus))
        if self._news and now_s - self._written_s >= WRITE_EVERY_S:
            self._written_s = now_s
            self._write()

    def take(self, answer: Answer) -> None:
        """Note what a worker said. Nothing of one that is gone: others see to that."""
        if answer.future.exception() is None:
            self._enter(answer.of, answer.future.result())

    def close(self, handles: Mapping[str, Handle]) -> None:
        """Ask those once more who can tell, before they are let go, and write it down."""
        asked = {handles[w].read_energy.remote(self._gpus): w for w in self._known.keys() & handles.keys()}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LAST_S) if asked else ([], [])
        for ref in answered:
            with suppress(RayError):
                self._enter(asked[ref], ray.get(ref))
        if self._news:
            self._write()

    def _enter(self, worker: str, reading: EnergyReading) -> None:
        if reading.is_measured:
            self._known[worker] = self._news[worker] = reading

    def _write(self) -> None:
        workers: dict[str, Any] = {worker: to_plain(reading) for worker, reading in self._news.items()}
        with suppress(StorageError):  # tried again with what comes next
            self._memory.note("energy", workers=workers)
            self._news = {}
