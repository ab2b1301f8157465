"""Training loops side by side: each trains without end in processes of its own, and only one runs at a time.

Whoever is not measured is stopped by SIGSTOP, so it costs nothing and keeps its memory, and no loop needs to know of
the other. A block counts from the end of the first step after the resumption, since that one was begun before it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from benchmarks.harness import ROOT
from benchmarks.support.environment import environment, worker_environment
from benchmarks.support.product import LiveRun
from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.cluster.connection import disconnect
from orchestrator.cluster.processes import living_of
from orchestrator.controller.recorder import RECORDS_EVERY_S
from orchestrator.controller.worker_group import POLL_PAUSE_S, POLL_S
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.usage import Traffic
from orchestrator.run_records.run_history import committed_steps, read_entries
from orchestrator.spec.job import JobSpec
from tests.support.worker_group import LocalWorkerGroup, MemberDied

START_TIMEOUT_S = 120.0
JOURNAL_EVERY_S = 0.5
BLOCK_TIMEOUT_S = 50.0  # below the minute after which gloo would give up


class Arm(ABC):
    """A loop that can be held still. `finished` grows with every step that it tells of."""

    def __init__(self) -> None:
        self._told = threading.Condition()
        self._finished: dict[int, tuple[float, float]] = {}  # step -> (time.time() of its end, loss)
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    @abstractmethod
    def pids(self) -> list[int]: ...

    @abstractmethod
    def close(self) -> None: ...

    @property
    def losses(self) -> dict[int, float]:
        with self._told:
            return {step: loss for step, (_, loss) in self._finished.items()}

    def tell(self, step: int, end_time: float, loss: float) -> None:
        """Enter a finished step."""
        with self._told:
            self._finished[step] = (end_time, loss)
            self._told.notify_all()

    def end(self) -> None:
        """Enter that there will be no more steps."""
        with self._told:
            self._over = True
            self._told.notify_all()

    def pause(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)

    def run_block(self, steps: int, timeout_s: float = BLOCK_TIMEOUT_S) -> float:
        """Run for `steps` whole steps, or some more, and pause. Returns steps per second.

        Raises:
            RuntimeError: they did not end in time, or a process ended.
        """
        resumed_time = time.time()

        def whole() -> list[float]:
            return sorted(end for end, _ in self._finished.values() if end > resumed_time)

        self.resume()
        with self._told:
            self._told.wait_for(lambda: self._over or len(whole()) > steps, timeout_s)
            ends = whole()
        if len(ends) <= steps:
            raise RuntimeError(f"{type(self).__name__} did {len(ends)} of {steps + 1} steps within {timeout_s:.0f} s")
        self.pause()
        return (len(ends) - 1) / (ends[-1] - ends[0])


class OurLoop(Arm):
    """The product's loop: real workers, asked for reports and records as often as a run's controller asks."""

    def __init__(self, job: JobSpec, store_dir: Path, run_dir: Path, world_size: int, threads: int) -> None:
        super().__init__()
        self.snapshot_interval = 0  # of the newest step
        self.traffic: dict[str, Traffic] = {}  # sent in the newest step by all ranks, by kind
        with environment(worker_environment(threads, keep_memory=True)):
            self._worker_group = LocalWorkerGroup(job, store_dir, run_dir, size=world_size, threads=threads)
        try:
            self._worker_group.start(self._worker_group.plan(self._worker_group.ids))
        except BaseException:
            self.close()
            raise
        for number, worker in enumerate(self._worker_group.ids):
            threading.Thread(target=self._follow, args=(worker, number == 0), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [member.process.pid or 0 for member in self._worker_group.members.values()]

    def close(self) -> None:
        for member in self._worker_group.members.values():
            member.kill()

    def _follow(self, worker: str, with_records: bool) -> None:
        """What a controller does all the time: a long poll, a short rest; now and then the newest records."""
        member, version, newest, asked_s = self._worker_group.members[worker], -1, -1, 0.0
        while True:
            try:
                version = member.call("report", None, version, POLL_S).version
                if with_records and time.monotonic() - asked_s >= RECORDS_EVERY_S:
                    asked_s = time.monotonic()
                    for record in member.call("report", newest, -1, 0.0).history.records:
                        newest, self.snapshot_interval = record.step, record.state.snapshot_interval
                        self.traffic = record.communication.traffic
                        self.tell(record.step, record.timing.vote_time, record.loss)
            except (MemberDied, OSError):
                return self.end()
            time.sleep(POLL_PAUSE_S)


class WholeProduct(Arm):
    """A run on a local cluster of its own, as a user has it: Ray, controller, scheduler, tracker and workers. No
    client asks for its status; steps are read from its journal."""

    def __init__(self, job: JobSpec, home: Path, num_cpus: int) -> None:
        super().__init__()
        self.records: dict[int, StepRecord] = {}
        self._home, self._is_paused = home, threading.Event()
        with self._at_home():
            self._cluster = local.up(num_cpus).record
            try:
                self._run_dir = LiveRun(OrchestratorClient(self._cluster.address), job).run_dir
            except BaseException:
                self.close()
                raise
            finally:
                disconnect()
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in living_of(self._cluster.head, self._cluster.processes)]

    def pause(self) -> None:
        self._is_paused.set()
        super().pause()

    def resume(self) -> None:
        super().resume()
        self._is_paused.clear()

    def close(self) -> None:
        self.end()
        self.resume()
        with self._at_home():
            local.down()

    def _at_home(self) -> AbstractContextManager[None]:
        return environment({"ORCHESTRATOR_HOME": str(self._home)})

    def _follow(self) -> None:
        seq = -1
        while not self._over:
            time.sleep(JOURNAL_EVERY_S)
            if self._is_paused.is_set():
                continue
            entries = read_entries(self._run_dir, seq)
            for record in committed_steps(entries):
                self.records[record.step] = record
                self.tell(record.step, record.timing.vote_time, record.loss)
            seq = max((entry.seq for entry in entries), default=seq)


class Loop(Arm):
    """One process per rank, of which the first prints a line of JSON for every step: `step`, `end_time`, `loss`."""

    def __init__(self, command: Sequence[str], world_size: int, variables: Mapping[str, str]) -> None:
        super().__init__()
        self.last: dict[str, Any] = {}  # line
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                env=os.environ
                | variables
                | {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()

    def _follow(self) -> None:
        output = self._ranks[0].stdout
        assert output is not None
        for line in output:
            if line.startswith("{"):
                self.last = json.loads(line)
                self.tell(self.last["step"], self.last["end_time"], self.last["loss"])
        self.end()


class BareLoop(Loop):
    """`benchmarks.baselines.bare_deepspeed`, one process per rank."""

    def __init__(self, job: JobSpec, store_dir: Path, world_size: int, threads: int, keep_memory: bool) -> None:
        self._meeting = tempfile.TemporaryDirectory(prefix="meet-")
        meeting = Path(self._meeting.name)
        (meeting / "job.json").write_text(job.model_dump_json(by_alias=True))
        command = ["benchmarks.baselines.bare_deepspeed", str(meeting / "job.json"), str(store_dir)]
        super().__init__([*command, str(meeting / "store")], world_size, worker_environment(threads, keep_memory))

    def close(self) -> None:
        super().close()
        self._meeting.cleanup()
