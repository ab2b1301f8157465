"""What is around simulated workers, each in a process that imports no more than it needs: services of a run."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.run_records.prepared_data import PreparationProgress, PreparedData
from orchestrator.tracking.sinks.sink import TrackerPosition, TrackerSetup

HURRY, HOLD = Path("sim", "hurry"), Path("sim", "hold")


def hurry(run_dir: Path) -> None:
    """Let steps take no time from now on: the test is done with everything that needs an active run."""
    (run_dir / HURRY).touch()


@contextmanager
def newcomers_held(run_dir: Path) -> Iterator[None]:
    """Keep further workers of the run from getting warm within the block."""
    (run_dir / HOLD).touch()
    try:
        yield
    finally:
        (run_dir / HOLD).unlink()


class SimulatedRendezvous:
    """Simulated workers meet through files, as long as the process lives whose id is given for a port."""

    def __init__(self, host: str) -> None:
        self._host = host

    def address(self) -> tuple[str, int]:
        return self._host, os.getpid()


class SimulatedPreparation:
    """No corpus is read."""

    def progress(self) -> PreparationProgress:
        return PreparationProgress()

    def prepare(self, job_json: str, run_dir: str, data_dir: str) -> PreparedData:
        tokenizer = Path(run_dir) / "tokenizer.json"
        tokenizer.write_text("{}")
        return PreparedData(store_dir=data_dir, vocab_size=300, tokenizer=str(tokenizer))


class FileTracker:
    """Takes what `orchestrator.tracking.tracker:Tracker` takes, into `published.jsonl` in its directory; what is there
    after its death it knows again."""

    def __init__(self, setup: TrackerSetup) -> None:
        self._path = Path(setup.directory) / "published.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        known = [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []
        self._position = max((line["step"] for line in known if "after" in line), default=-1)
        self._seqs = {line["seq"] for line in known if "seq" in line}

    def position(self) -> TrackerPosition:
        return TrackerPosition(self._position, max(self._seqs, default=-1))

    def publish(self, term: int, points: list[Any], after: int | None = None, loads: Any = None) -> None:
        if after is not None:
            points = [p for p in points if p.step > self._position]
            self._position = max([self._position, *(p.step for p in points)])
        whole = {} if after is None else {"after": after}
        self._write([{"term": term, "name": p.name, "value": p.value, "step": p.step} | whole for p in points])

    def event(self, term: int, entry: JournalEntry, points: list[Any], after: int) -> None:
        assert after <= max(self._seqs, default=-1), f"events after {max(self._seqs, default=-1)} are missing"
        if entry.seq in self._seqs:
            return
        self._seqs.add(entry.seq)
        self._write([{"term": term, "event": entry.event.kind, "seq": entry.seq}])

    def inputs(self, term: int, datasets: tuple[Any, ...]) -> None:
        pass

    def artifact(self, term: int, path: str) -> None:
        self._write([{"term": term, "artifact": Path(path).name}])

    def finish(self, term: int, outcome: str, reason: str = "", timeout_s: float = 30.0) -> bool:
        self._write([{"term": term, "outcome": outcome}])
        return True

    def describe(self) -> dict[str, Any]:
        return {"url": f"file://{self._path}", "waiting": 0, "error": "", "position": self._position}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._lock, self._path.open("ab", buffering=0) as file:  # at once: it may be killed at any moment
            file.write(text.encode())


def simulated_parts() -> ActorClasses:
    """What to give `Scheduler.submit` as `parts`."""
    here = "tests.support.simulated_services"
    return ActorClasses(
        worker="tests.support.simulated_worker:SimulatedWorker",
        rendezvous=f"{here}:SimulatedRendezvous",
        tracker=f"{here}:FileTracker",
        preparation=f"{here}:SimulatedPreparation",
    )
