"""Journal of a run: decisions and events, as a chain of immutable objects in run storage.

    RUN/journal/0000000042      entry 42: {"term", "prev", "nonce", "seq", "holder", "events"}

`prev` is the SHA-256 of entry 41, `seq` the number of the entry's first event, `nonce` makes an entry unlike any other
writer's. An entry is appended by creating its object, which fails if the number is taken: compare-and-append.

A controller takes its term by appending an entry without events. The entry after an old controller's last one is
therefore its own, or the first of a later term: no past controller can append, whatever it believes. An answer that was
lost is recognised by the entry's bytes.
"""

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.objects import Objects

FOLDER = "journal"
ROOT_DIGEST = ""  # `prev` of entry 0

Event = dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """An entry as it was read. `digest`: SHA-256 of its bytes."""

    number: int
    term: int
    prev: str
    seq: int
    events: tuple[Event, ...]
    digest: str

    @property
    def next_seq(self) -> int:
        return self.seq + len(self.events)


class Journal:
    """Appends events under a term of its own, which it takes when it is made. No two journals get the same.

    Args:
        objects: the run's, in run storage.
        holder: who takes the term, for people that read the journal.

    Raises:
        OSError: storage can't be read or written.
        JournalCorrupt: the newest entry can't be read.
    """

    def __init__(self, objects: Objects, holder: str = "") -> None:
        self._objects = objects
        self._last = _newest(objects)
        self._unsettled: bytes | None = None  # an entry of ours that may be there, though its creation failed
        self.term = 0
        while self.term == 0:
            term = (self._last.term if self._last else 0) + 1
            data = self._bytes_of(term, (), holder)
            self._last = self._entry_at_next_number(data)
            self.term = term if self._last.digest == sha256(data).hexdigest() else 0

    def append(self, events: Sequence[Mapping[str, Any]]) -> list[Event]:
        """Write these events as one entry: readers see all of them or none.

        Returns:
            the events with their `seq`, `term` and `time` (`time.time()` seconds).

        Raises:
            TermSuperseded: a newer controller has taken over; nothing was written.
            OSError: storage can't be written. The events may be there all the same, if storage couldn't be read either:
                the next call finds out.
        """
        if not events:
            return []
        self._settle()
        return list(self._create(self._bytes_of(self.term, events)).events)

    def _bytes_of(self, term: int, events: Sequence[Mapping[str, Any]], holder: str = "") -> bytes:
        """The next entry. Stamps come last in an event, which can't forge its own."""
        seq = self._last.next_seq if self._last else 0
        stamps = ({"seq": seq + i, "term": term, "time": time.time()} for i in range(len(events)))
        plain = {
            "term": term,
            "prev": self._last.digest if self._last else ROOT_DIGEST,
            "nonce": secrets.token_hex(8),
            "seq": seq,
            "holder": holder,
            "events": [{**stamp, **event, **stamp} for stamp, event in zip(stamps, events, strict=True)],
        }
        return json.dumps(plain, separators=(",", ":")).encode()

    def _settle(self) -> None:
        """Find out whether the entry whose creation failed is there: it is then the last one."""
        if self._unsettled is not None:
            with suppress(FileNotFoundError):
                self._objects.get(key_of(self._last.number + 1 if self._last else 0))
                self._create(self._unsettled)
            self._unsettled = None

    def _create(self, data: bytes) -> _Entry:
        """Create the next entry. Raises TermSuperseded if another controller has, now and in every later call."""
        self._unsettled = data
        found = self._entry_at_next_number(data)
        if found.digest != sha256(data).hexdigest():
            raise TermSuperseded(
                f"term {self.term} may not write to the journal: entry {found.number} is of term {found.term}",
                unchanged="Nothing was written.",
            )
        self._unsettled, self._last = None, found
        return found

    def _entry_at_next_number(self, data: bytes) -> _Entry:
        """The entry that has the next number, once `data` was offered for it."""
        number = self._last.number + 1 if self._last else 0
        return _entry_of(number, self._objects.create(key_of(number), data))


def read_events(run_dir: Path, after: int = -1) -> list[Event]:
    """Every event with a `seq` above `after`, in order. Needs no cluster.

    Raises:
        JournalCorrupt: an entry is missing, can't be read, or is not the successor of the one before.
    """
    entries: list[_Entry] = []
    for entry in _backwards(DirectoryObjects(run_dir)):
        entries.append(entry)
        if entry.seq <= after + 1:
            break
    return [event for entry in reversed(entries) for event in entry.events if event["seq"] > after]


def newest_term(run_dir: Path) -> int:
    """The highest term taken so far; 0 if none was."""
    newest = _newest(DirectoryObjects(run_dir))
    return newest.term if newest else 0


def has_journal(run_dir: Path) -> bool:
    """Whether any controller has taken a term of this run. Reads no entry."""
    try:
        return bool(_numbers(DirectoryObjects(run_dir)))
    except NotADirectoryError:
        return False


def key_of(number: int) -> str:
    """Key of a journal entry: numbers sort as text does."""
    return f"{FOLDER}/{number:010d}"


def _numbers(objects: Objects) -> list[int]:
    return sorted(int(name) for name in objects.names(FOLDER) if re.fullmatch(r"\d{10}", name))


def _newest(objects: Objects) -> _Entry | None:
    return next(_backwards(objects), None)


def _backwards(objects: Objects) -> Iterator[_Entry]:
    """Entries from the newest to the first, each checked against its successor."""
    numbers = _numbers(objects)
    successor: _Entry | None = None
    for number in reversed(range(numbers[-1] + 1) if numbers else ()):
        try:
            entry = _entry_of(number, objects.get(key_of(number)))
        except FileNotFoundError:
            raise _damaged(number, "is missing, though later ones are there") from None
        if successor is not None and successor.prev != entry.digest:
            raise _damaged(number, f"is not the one that entry {successor.number} follows: its SHA-256 differs")
        yield entry
        successor = entry


def _entry_of(number: int, data: bytes) -> _Entry:
    try:
        plain = json.loads(data)
        term, prev, seq, events = int(plain["term"]), str(plain["prev"]), int(plain["seq"]), tuple(plain["events"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(number, f"can't be read: {error!r}") from error
    return _Entry(number, term, prev, seq, events, sha256(data).hexdigest())


def _damaged(number: int, how: str) -> JournalCorrupt:
    return JournalCorrupt(
        f"journal entry {key_of(number)} {how}",
        remedy="Restore it from a copy of run storage; `resume` refuses a run whose journal is damaged.",
        unchanged="Nothing was changed.",
    )
