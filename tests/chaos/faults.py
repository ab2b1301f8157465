"""Faults as they are made: signals to processes of the run's own cluster, its storage filled, frozen or covered, and
calls to it that hang, fail or are slow."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.cluster import Cluster
from tests.chaos.observer import Observer
from tests.chaos.schedule import Fault, Kind
from tests.support.call_faults import CallFault, Effect
from tests.support.disk import fill, frozen, read_only, unmounted
from tests.support.fuse_disk import FuseDisk
from tests.support.worker_processes import title_of

FILL_EVERY_S = 0.05  # what the run frees meanwhile is filled too
ON_FUSE = {
    Kind.HUNG: CallFault("*", Effect.HANG),
    Kind.FAILING: CallFault("*", Effect.ERROR),
    Kind.SLOW: CallFault("*", Effect.DELAY, seconds=0.1),
}


@dataclass
class Faults:
    """Makes faults to a run.

    Args:
        disk: where its storage is.
        fuse: that disk, if it is one by FUSE.

    Attributes:
        num_killed: processes so far.
        num_missed: faults that hit no process.
    """

    cluster: Cluster
    run: str
    disk: Path
    observer: Observer
    fuse: FuseDisk | None = None
    num_killed: int = 0
    num_missed: int = 0

    def make(self, fault: Fault) -> str:
        """A fault that happens at once. Returns what was hit."""
        match fault.kind:
            case Kind.KILL_MEMBER:
                return self._kill(*self._members(fault.pick, 1))
            case Kind.KILL_PAIR:
                return self._kill(*self._members(fault.pick, 2))
            case Kind.KILL_STANDBY:
                workers = self.cluster.workers(self.run)
                standbys = sorted(workers.keys() - set(self.observer.members()))
                return self._kill(*(workers[name] for name in standbys[:1]))
            case Kind.KILL_CONTROLLER:
                return self._kill(self.cluster.controller(self.run))
            case Kind.KILL_SCHEDULER:
                return self._kill(self.cluster.actor("ray::scheduler"))
            case Kind.KILL_TRACKER:
                return self._kill(self.cluster.actor(f"ray::tracker {self.run}"))
            case Kind.KILL_STORAGE_PROCESS:
                return self._kill(self.cluster.storage_process(self.run))
        raise ValueError(f"{fault.kind} lasts")

    @contextmanager
    def lasting(self, fault: Fault) -> Iterator[str]:
        """A fault that lasts as long as this does. Yields what is hit."""
        with ExitStack() as stack:
            hit = str(self.disk)
            match fault.kind:
                case Kind.FULL:
                    stack.enter_context(self.full())
                case kind if self.fuse is not None and kind in ON_FUSE:
                    stack.enter_context(self.fuse.having(ON_FUSE[kind]))
                case Kind.HUNG:
                    stack.enter_context(frozen(self.disk))
                case Kind.READ_ONLY:
                    stack.enter_context(read_only(self.disk))
                case Kind.UNMOUNTED:
                    stack.enter_context(unmounted(self.disk))
                case _:
                    hit = stack.enter_context(_stopped(self._members(fault.pick, 1)))
            yield hit

    @contextmanager
    def full(self) -> Iterator[None]:
        """Storage without room."""
        filler = fill(self.disk)
        try:
            yield
        finally:
            filler.unlink()

    def keep_up(self, kind: Kind, seconds: float) -> None:
        """Let a fault last for these seconds more."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            if kind is Kind.FULL:
                fill(self.disk)
            time.sleep(min(FILL_EVERY_S, left_s))

    def _members(self, pick: int, count: int) -> list[psutil.Process]:
        """Processes of some members, from this rank on; after all of them that of a lone member's keeper."""
        workers, members = self.cluster.workers(self.run), self.observer.members()
        first = pick % max(1, len(members))
        ordered = [*members[first:], *members[:first], *self.observer.keeper()]
        return [workers[name] for name in ordered[:count] if name in workers]

    def _kill(self, *processes: psutil.Process) -> str:
        hit = []
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                hit.append(f"{process.pid} ({title_of(process).split(' -m ')[-1]})")
                process.kill()  # psutil compares the start time: never another process with a reused pid
                self.num_killed += 1
        self.num_missed += not hit
        return ", ".join(hit) or "no such process now"


@contextmanager
def _stopped(processes: list[psutil.Process]) -> Iterator[str]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield ", ".join(f"{process.pid} ({title_of(process)})" for process in processes)
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # taken for lost, and killed
                process.resume()
