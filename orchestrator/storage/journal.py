"""Journal of a run: decisions and events, as small append-only objects in run storage.

    RUN/terms/000002                     created by the controller that took term 2; never removed
    RUN/journal/000002-00000042.json      events 42 and following, written by term 2: {"events": [...]}

Nothing is ever overwritten. An event's `seq` counts through all terms. Readers ignore objects that a superseded
controller still manages to write after its successor has begun: their events have numbers that the successor's first
event claims already.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import TermSuperseded
from orchestrator.storage.atomic import create_atomically, flush

Event = dict[str, Any]


def acquire_term(run_dir: Path) -> int:
    """Take the next term of the run. No two callers get the same."""
    terms = run_dir / "terms"
    terms.mkdir(parents=True, exist_ok=True)
    while True:
        term = newest_term(run_dir) + 1
        try:
            os.close(os.open(terms / f"{term:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        flush(terms)
        return term


def newest_term(run_dir: Path) -> int:
    """The highest term taken so far; 0 if none was."""
    terms = run_dir / "terms"
    return max((int(entry.name) for entry in terms.iterdir()), default=0) if terms.is_dir() else 0


class Journal:
    """Appends events under one term.

    Args:
        run_dir: the run's directory in run storage.
        term: taken by `acquire_term`.
    """

    def __init__(self, run_dir: Path, term: int) -> None:
        self._run_dir = run_dir
        self._term = term
        (run_dir / "journal").mkdir(parents=True, exist_ok=True)
        past = read_events(run_dir)
        self._next_seq = past[-1]["seq"] + 1 if past else 0

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Write these events as one object: readers see all of them or none.

        Returns:
            the events with their `seq`, `term` and `time` (`time.time()` seconds).

        Raises:
            TermSuperseded: a newer controller has taken over; nothing was written.
        """
        newest = newest_term(self._run_dir)
        if newest > self._term:
            raise TermSuperseded(
                f"term {self._term} may not write to the journal in {self._run_dir}: term {newest} does",
                unchanged="Nothing was written.",
            )
        stamps = ({"seq": self._next_seq + i, "term": self._term, "time": time.time()} for i in range(len(events)))
        numbered = [
            {**stamp, **event, **stamp} for stamp, event in zip(stamps, events, strict=True)
        ]  # an event can't forge its stamp
        if numbered:
            name = f"{self._term:06d}-{self._next_seq:08d}.json"
            create_atomically(self._run_dir / "journal" / name, json.dumps({"events": numbered}, separators=(",", ":")))
            self._next_seq += len(numbered)
        return numbered


def read_events(run_dir: Path, after: int = -1) -> list[Event]:
    """Every event with a `seq` above `after`, in order. Needs no cluster."""
    events: list[Event] = []
    for _, _, path in sorted(_objects(run_dir), reverse=True):
        batch = json.loads(path.read_text())["events"]
        claimed = events[-1]["seq"] if events else None
        events += [event for event in reversed(batch) if claimed is None or event["seq"] < claimed]
        if events and events[-1]["seq"] <= after + 1:
            break
    return [event for event in reversed(events) if event["seq"] > after]


def _objects(run_dir: Path) -> Iterator[tuple[int, int, Path]]:
    journal = run_dir / "journal"
    if journal.is_dir():
        for name in os.listdir(journal):  # `glob` would treat an unreadable directory as empty
            if (numbers := re.fullmatch(r"(\d+)-(\d+)\.json", name)) is not None:
                yield int(numbers[1]), int(numbers[2]), journal / name
