"""Player of a schedule: makes its faults to a run, one after the other, and checks after each that the run goes on."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.checks import Checks
from tests.chaos.cluster import Answer, Cluster
from tests.chaos.faults import Faults
from tests.chaos.invariants import is_replaying, storage_faults
from tests.chaos.observer import Observer
from tests.chaos.schedule import Fault, Kind, Schedule

ANSWER_S = 2.0  # in which a verb answers on a machine that is not busy
BUSY = 3.0  # longer than the longest of the last answers while all was well: other processes compute meanwhile
LAST_ANSWERS = 5
BUSY_LOAD = 4.0  # processes that share a core: a worker may then be silent for longer than a controller waits
SILENCE = "ot answer"  # in why a worker was taken for lost, or the steps with it
GONE_ON = 3  # steps after a fault
LOOK_S = 0.5
MIDDLE = 0.4  # of a fault, where others happen
FULL_S = 4.0  # that storage is full before and after the request to stop
ENDED = ("succeeded", "failed", "stopped", "paused")
REPLACED = {Kind.KILL_SCHEDULER: "ray::scheduler", Kind.KILL_TRACKER: "ray::tracker {run}"}  # by title


class RunLost(Exception):
    """The run can't go on, or doesn't: later faults would show nothing."""


@dataclass
class Player:
    """Plays a schedule to a run.

    Args:
        patience_s: longest time until a run goes on after a fault, or ends.

    Attributes:
        wanted: number of workers requested last.
    """

    cluster: Cluster
    run: str
    faults: Faults
    observer: Observer
    checks: Checks
    patience_s: float
    wanted: int
    usual_s: list[float] = field(default_factory=list)  # of answers while all was well

    @property
    def answer_s(self) -> float:
        """In which a verb must answer now."""
        return ANSWER_S + BUSY * max(self.usual_s[-LAST_ANSWERS:])

    def begin(self) -> None:
        """Wait until the run trains and has a checkpoint."""
        self._await_steps(GONE_ON)
        while not any(event["kind"] == "checkpoint" for event in self.observer.events):
            self._await_steps(self.observer.step + GONE_ON)
        self._status()  # connects
        self.usual_s += (self._usual_s() for _ in range(LAST_ANSWERS))
        self.checks.say(f"step {self.observer.step}: begun; a verb must answer within {self.answer_s:.1f} s")

    def play(self, schedule: Schedule) -> None:
        """Make all faults. Raises RunLost if the run doesn't go on after one."""
        groups: list[list[Fault]] = []
        for fault in schedule.faults:
            groups[-1].append(fault) if fault.is_within else groups.append([fault])
        for first, *within in groups:
            self._await_steps(self.observer.step + first.after_steps)
            self._play(first, within, schedule.is_alone(first))

    def end(self, when_full: bool) -> dict[str, Any]:
        """Stop the run. Returns its last status. Raises RunLost if it doesn't end."""
        if when_full:
            with self.faults.full():
                self.faults.keep_up(Kind.FULL, FULL_S)
                self._request("stop", is_timed=True)
                self.faults.keep_up(Kind.FULL, FULL_S)
        else:
            self._request("stop", is_timed=True)
        deadline_s = time.monotonic() + self.patience_s
        while (status := self._status().value or {}).get("phase") not in ENDED:
            if time.monotonic() > deadline_s:
                raise RunLost(f"not ended {self.patience_s:.0f} s after the request to stop: {_brief(status)}")
            time.sleep(LOOK_S)
        return status

    def _play(self, fault: Fault, within: Sequence[Fault], is_alone: bool) -> None:
        events, term = len(self.observer.events), self.observer.term
        names = ", ".join(str(fault.number) for fault in (fault, *within))
        killed: list[tuple[Kind, int]] = []
        if fault.kind.lasts:
            self._last(fault, within, killed)
        else:
            self._scale(fault, is_timed=False)
            self._strike(fault, killed)
            self._check_answer(names, self._status(), killed)
        self._check_goes_on(names, killed, term)
        if is_alone:
            self._check_losses(names, storage_faults(self.observer.events[events:]))
        self.checks.check(f"{names}: journal and checkpoints are whole", self.observer.new_faults())

    def _last(self, fault: Fault, within: Sequence[Fault], killed: list[tuple[Kind, int]]) -> None:
        began_s = time.monotonic()
        with self.faults.lasting(fault) as hit:
            self.checks.say(f"step {self.observer.step}: {fault}: {hit}")
            self.faults.keep_up(fault.kind, MIDDLE * fault.seconds)
            for other in within:
                self._strike(other, killed)
            self._scale(fault, is_timed=fault.kind.is_of_storage and not _steering(killed))
            self.faults.keep_up(fault.kind, fault.seconds - (time.monotonic() - began_s))
            answer = self._status()
        storage = (answer.value or {}).get("storage")
        self.checks.say(f"step {self.observer.step}: over after {time.monotonic() - began_s:.1f} s; storage: {storage}")
        self._check_answer(str(fault.number), answer, killed)

    def _strike(self, fault: Fault, killed: list[tuple[Kind, int]]) -> None:
        hit = self.faults.make(fault)
        killed += [(fault.kind, int(text.split()[0])) for text in hit.split(", ") if text[:1].isdigit()]
        self.checks.say(f"step {self.observer.step}: {fault}: {hit}")

    def _scale(self, fault: Fault, is_timed: bool) -> None:
        if fault.workers is not None:
            self.wanted = fault.workers
            self._request("scale", fault.workers, is_timed=is_timed)

    def _request(self, verb: str, *args: int, is_timed: bool) -> None:
        answer = self.cluster.ask(verb, self.run, *args)
        made = " ".join(map(str, (verb, *args)))
        self.checks.say(f"step {self.observer.step}: {made}: exit code {answer.code} after {answer.seconds:.1f} s")
        accepted = answer.code == 0 or (answer.code == 101 and "accepted" in answer.error)
        faults = [] if accepted else [f"exit code {answer.code}: {answer.error}"]
        if is_timed and answer.seconds > self.answer_s:
            faults.append(f"answered after {answer.seconds:.1f} s, allowed are {self.answer_s:.1f}")
        self.checks.check(f"{verb} is accepted", faults)

    def _status(self) -> Answer:
        return self.cluster.ask("status", self.run)

    def _usual_s(self) -> float:
        """Seconds of an answer that goes through Scheduler and controller, as that to `scale` does."""
        return self.cluster.ask("get", self.run).seconds

    def _check_answer(self, names: str, answer: Answer, killed: Sequence[tuple[Kind, int]]) -> None:
        faults = [] if answer.code == 0 else [f"exit code {answer.code}: {answer.error}"]
        if answer.seconds > self.answer_s and not _steering(killed):
            faults.append(f"after {answer.seconds:.1f} s, allowed are {self.answer_s:.1f}")
        self.checks.check(f"{names}: status answers", faults)

    def _check_losses(self, names: str, losses: list[str]) -> None:
        what = f"{names}: storage alone costs no worker and no step"
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        if losses and all(SILENCE in loss for loss in losses) and load > BUSY_LOAD:
            self.checks.say(f"not judged, as {load:.0f} processes share a core: {what}: {'; '.join(losses)}")
            return
        self.checks.check(what, losses)

    def _check_goes_on(self, names: str, killed: Sequence[tuple[Kind, int]], term: int) -> None:
        """Wait until the run trains with as many workers as wanted, all that was killed is replaced, and storage is
        well."""
        over_s, over_time, step = time.monotonic(), time.time(), self.observer.step
        while lacks := self._lacks(killed, term, step + GONE_ON, over_time):
            if time.monotonic() - over_s > self.patience_s:
                self.checks.check(f"{names}: the run goes on", lacks)
                raise RunLost(f"not well {self.patience_s:.0f} s after fault {names}")
            time.sleep(LOOK_S)
        self.usual_s.append(self._usual_s())
        self.checks.check(f"{names}: the run goes on", [])
        went_s = time.monotonic() - over_s
        self.checks.say(f"step {self.observer.step}: gone on after {went_s:.1f} s with {self.wanted} workers")

    def _lacks(self, killed: Sequence[tuple[Kind, int]], term: int, step: int, since: float) -> list[str]:
        """What is not yet as it should be."""
        status = self._status().value or {}
        if status.get("phase") in ENDED:
            raise RunLost(_brief(status))
        expected = {"phase": "training", "workers_now": self.wanted, "storage": "well"}
        lacks = [
            f"{key} is {status.get(key)}, not {value}" for key, value in expected.items() if status.get(key) != value
        ]
        if (status.get("as_of_time") or 0.0) < since:
            lacks.append("the status is older than the fault's end")
        if self.observer.step < step:
            lacks.append(f"the newest committed step is {self.observer.step}")
        if is_replaying(self.observer.events):
            lacks.append("steps that were given up are not all done again")
        if self.observer.term == term and any(kind is Kind.KILL_CONTROLLER for kind, _ in killed):
            lacks.append(f"the controller still has term {term}")
        for kind, pid in killed:
            title = REPLACED.get(kind, "").format(run=self.run)
            if title and all(process.pid == pid for process in self.cluster.titled(title)):
                lacks.append(f"there is no new {title}")
        return [*lacks, _brief(status)] if lacks else []

    def _await_steps(self, step: int) -> None:
        deadline_s = time.monotonic() + self.patience_s
        while self.observer.step < step:
            if time.monotonic() > deadline_s:
                raise RunLost(f"at step {self.observer.step}, not {step}: {_brief(self._status().value or {})}")
            time.sleep(LOOK_S)


def _steering(killed: Sequence[tuple[Kind, int]]) -> bool:
    """Whether one of those that answer was killed: the next one takes its time to start."""
    return any(kind in (Kind.KILL_CONTROLLER, Kind.KILL_SCHEDULER) for kind, _ in killed)


def _brief(status: dict[str, Any]) -> str:
    keys = ("phase", "step", "workers_now", "workers_wanted", "storage", "why", "warning", "error")
    return ", ".join(f"{key} {status[key]}" for key in keys if status.get(key) not in (None, ""))
