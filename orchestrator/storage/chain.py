"""Entries of a journal, each of which names the digest of the one before, and the keys of a journal's objects.

RUN/journal/0000000042                            entry 42
RUN/journal/state-0000000511                      what a run's history comes to with entry 511
RUN/journal/history-0000000000-0000000511.gz      entries 0 to 511
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from orchestrator.errors import JournalCorrupt
from orchestrator.storage.objects import Objects

FOLDER = "journal"

Event = dict[str, Any]


@dataclass(frozen=True)
class Holder:
    """The controller that holds a term.

    Args:
        process: for people, such as `HOST pid 17`.
        cluster: id of its cluster; empty outside of any.
    """

    process: str = ""
    cluster: str = ""


NO_HOLDER = Holder()


@dataclass(frozen=True)
class Link:
    """What the next entry needs to know of an entry.

    Args:
        digest: SHA-256 of its bytes.
        next_seq: number of the first event after it.
        holder: of its term.
    """

    number: int
    term: int
    digest: str
    next_seq: int
    holder: Holder = NO_HOLDER


BEGINNING = Link(number=-1, term=0, digest="", next_seq=0)  # what entry 0 follows


@dataclass(frozen=True)
class ChainEntry:
    """An entry as it was read.

    Args:
        prev: digest of the entry before.
        seq: number of its first event.
        where: the entry, and the object that holds it, for messages.
    """

    link: Link
    prev: str
    seq: int
    events: tuple[Event, ...]
    data: bytes
    where: str

    @property
    def number(self) -> int:
        return self.link.number


def entry_from(number: int, data: bytes, where: str) -> ChainEntry:
    """The entry of these bytes. Raises JournalCorrupt."""
    try:
        plain = json.loads(data)
        term, prev, seq, events = int(plain["term"]), str(plain["prev"]), int(plain["seq"]), tuple(plain["events"])
        holder = Holder(**plain["holder"])
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(where, f"can't be read: {error!r}") from error
    link = Link(number, term, sha256(data).hexdigest(), seq + len(events), holder)
    return ChainEntry(link, prev, seq, events, data, where)


def entry_key(number: int) -> str:
    """Key of a journal entry: numbers sort as text does."""
    return f"{FOLDER}/{number:010d}"


def state_key(number: int) -> str:
    """Key of the state that includes the entries up to this one."""
    return f"{FOLDER}/state-{number:010d}"


@dataclass(frozen=True, order=True)
class HistoryName:
    """The object that holds the entries from `first` to `last`."""

    first: int
    last: int

    @property
    def key(self) -> str:
        return f"{FOLDER}/history-{self.first:010d}-{self.last:010d}.gz"

    def __contains__(self, other: "int | HistoryName") -> bool:
        if isinstance(other, int):
            return self.first <= other <= self.last
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class JournalNames:
    """Objects of a journal at one moment, ascending.

    Args:
        histories: those that the newest state includes. Others are not known to be whole.
    """

    entries: tuple[int, ...]
    states: tuple[int, ...]
    histories: tuple[HistoryName, ...]

    @property
    def newest_state(self) -> int:
        """Number of the newest entry that a state includes; -1 without one."""
        return max(self.states, default=-1)

    @property
    def newest(self) -> int:
        """Number of the newest entry; -1 if there is none."""
        return max(*self.entries[-1:], self.newest_state, -1)

    def history_of(self, number: int) -> HistoryName | None:
        """The history that holds this entry and reaches farthest."""
        holding = (history for history in self.histories if number in history)
        return max(holding, key=lambda history: history.last, default=None)

    def contained(self) -> dict[HistoryName, HistoryName]:
        """Histories that a larger one contains, with the largest one that does."""
        by_size = sorted(self.histories, key=lambda history: history.last - history.first)
        return {part: whole for whole in by_size for part in self.histories if part in whole}


def list_names(objects: Objects) -> JournalNames:
    """The objects of the journal now. Raises OSError."""
    names = objects.names(FOLDER)
    states = _numbers(r"state-(\d{10})", names)
    newest = max((number for (number,) in states), default=-1)
    histories = (HistoryName(*ends) for ends in _numbers(r"history-(\d{10})-(\d{10})\.gz", names))
    return JournalNames(
        tuple(sorted(number for (number,) in _numbers(r"(\d{10})", names))),
        tuple(sorted(number for (number,) in states)),
        tuple(sorted(history for history in histories if history.last <= newest)),
    )


def _numbers(pattern: str, names: Iterable[str]) -> list[list[int]]:
    return [[int(text) for text in found.groups()] for name in names if (found := re.fullmatch(pattern, name))]


def damaged(what: str, how: str) -> JournalCorrupt:
    """The error that names a damaged part of a journal."""
    return JournalCorrupt(
        f"{what} {how}",
        remedy="Restore it from a copy of run storage; `resume` refuses a run whose journal is damaged.",
        unchanged="Nothing was changed.",
    )
