"""Journal of a run: decisions and events, as a chain of immutable objects in run storage.

    RUN/journal/0000000042      entry 42: {"term", "prev", "nonce", "seq", "holder", "events"}

`prev` is the SHA-256 of entry 41, `seq` the number of the entry's first event, `nonce` makes an entry unlike any other
writer's. An entry is appended by creating its object, which fails if the number is taken: compare-and-append.

A controller takes its term by appending an entry without events. The entry after an old controller's last one is
therefore its own, or the first of a later term: no past controller can append, whatever it believes. An answer that was
lost is recognised by the entry's bytes. Compaction (`storage.compaction`) keeps the names that this needs.

A controller that is about to take a term may believe any number to be the next one, and compaction may have freed it.
So it lists the journal's objects once its entry is there, and has no term if a state includes that number.

While run storage hangs or refuses, entries are *kept* elsewhere, so that decisions can be made: as objects named by the
entry that they follow, of which there is one each. They are stored later, in order, by the controller that made them or
by its successor. The successor offers the entry of its term there first: it either gets what was kept, or no past
controller can keep anything any more.
"""

import errno
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from orchestrator.errors import JournalCorrupt, KeyUnknown, TermSuperseded
from orchestrator.storage.chain import (
    BEGINNING,
    FOLDER,
    NO_HOLDER,
    ChainEntry,
    Event,
    Holder,
    Link,
    entry_from,
    entry_key,
    list_names,
)
from orchestrator.storage.chain_reader import ChainReader
from orchestrator.storage.objects import Objects


class Journal:
    """Appends events under a new term, which the constructor takes. No two journals get the same term.

    `append` writes an entry at once. In its place, entries may be made by `propose` in one thread, and stored in the
    same order by another one. Entries that were proposed have to be stored before `append` is called.

    Args:
        objects: the run's, in run storage.
        holder: who takes the term.
        kept: where entries are kept that storage doesn't take; None: nowhere.
        followed: the newest term of another cluster's controller that this one may follow; None: any.

    Attributes:
        last: of the newest entry that was made.
        stored: of the newest one that it has stored.
        num_bytes: of all entries that it has stored.

    Raises:
        OSError: storage can't be read or written.
        JournalCorrupt: the newest entry can't be read.
        TermSuperseded: another cluster's controller has taken a later term than `followed`.
    """

    def __init__(
        self, objects: Objects, holder: Holder = NO_HOLDER, kept: Objects | None = None, followed: int | None = None
    ) -> None:
        self._objects, self._kept, self._holder = objects, kept, holder
        self.last = ChainReader(objects).newest_link()
        self._unsettled: bytes | None = None  # an entry of ours that may be there, though its creation failed
        self._superseded: Link | None = None  # an entry of a later term: this journal may write nothing more
        self.num_bytes = 0
        self.term = 0
        while self.term == 0:
            is_foreign = self.last.holder.cluster != holder.cluster
            if followed is not None and self.last.term > followed and is_foreign:
                raise _superseded_by(self.last, "no term may be taken from another cluster's controller")
            term = self.last.term + 1
            data = self._bytes_of(term, ())
            found = self._stored_at_next_number(self._kept_or(data))
            if list_names(objects).newest_state >= found.number:  # the number had been freed
                self.last = ChainReader(objects).newest_link()
            else:
                self.last = found.link
                self.term = term if found.data == data else 0
        self.stored = self.last

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
        before, entry = self.last, self.propose(events)
        try:
            self.store(entry)
        except BaseException:
            self.last, self._unsettled = before, entry.data
            raise
        return list(entry.events)

    def propose(self, events: Sequence[Mapping[str, Any]]) -> ChainEntry:
        """Make the next entry, of these events with their `seq`, `term` and `time`."""
        number = self.last.number + 1
        entry = entry_from(number, self._bytes_of(self.term, events), f"journal entry {entry_key(number)}")
        self.last = entry.link
        return entry

    def store(self, entry: ChainEntry) -> None:
        """Store the oldest entry that was proposed. May be repeated until it succeeds.

        Raises:
            TermSuperseded: a newer controller has taken over; nothing was written, now and in every later call.
            OSError: storage can't be written, or doesn't show whether it was.
        """
        self._offer(self._objects, entry_key(entry.number), entry)
        self.stored = entry.link
        self.num_bytes += len(entry.data)

    def keep(self, entry: ChainEntry) -> None:
        """Keep an entry that was proposed, and that storage hasn't taken yet, for a successor.

        Raises:
            TermSuperseded: a newer controller has taken over; nothing was kept, now and in every later call.
            OSError: it can't be kept.
        """
        if self._kept is None:
            raise OSError(errno.ENOSYS, "journal entries can only be stored")
        self._offer(self._kept, _kept_key(entry.number, entry.prev), entry)

    def unkeep(self, entry: ChainEntry) -> None:
        """Delete an entry that was kept and has been stored. Raises OSError."""
        if self._kept is not None:
            self._kept.delete([_kept_key(entry.number, entry.prev)])

    def discard_kept(self) -> None:
        """Delete all that is kept, at the run's end, if it can be: another run has other entries."""
        if self._kept is not None:
            with suppress(OSError):
                self._kept.delete([f"{FOLDER}/{name}" for name in self._kept.names(FOLDER)])

    def _bytes_of(self, term: int, events: Sequence[Mapping[str, Any]]) -> bytes:
        """The next entry. Stamps come last in an event, which can't forge its own."""
        seq = self.last.next_seq
        stamps = ({"seq": seq + i, "term": term, "time": time.time()} for i in range(len(events)))
        plain = {
            "term": term,
            "prev": self.last.digest,
            "nonce": secrets.token_hex(8),
            "seq": seq,
            "holder": asdict(self._holder),
            "events": [{**stamp, **event, **stamp} for stamp, event in zip(stamps, events, strict=True)],
        }
        return json.dumps(plain, separators=(",", ":")).encode()

    def _settle(self) -> None:
        """Find out whether the entry whose creation failed exists; if so, it is the last one."""
        self._refuse_the_past()
        if self._unsettled is not None:
            entry = entry_from(self.last.number + 1, self._unsettled, "the entry before")
            if self._has(entry_key(entry.number)):
                self.store(entry)
                self.last = entry.link
            self._unsettled = None

    def _has(self, key: str) -> bool:
        """Whether an object of any writer exists under this key. Raises OSError."""
        try:
            with suppress(KeyUnknown, JournalCorrupt):
                self._objects.get(key)
        except FileNotFoundError:
            return False
        return True

    def _kept_or(self, data: bytes) -> bytes:
        """The entry that was kept as the next one; `data` if none was, which is then kept and stays: it fences off past
        controllers. The first entry of all needs no fence, as no controller has decided anything before it."""
        if self._kept is None or self.last == BEGINNING:
            return data
        return self._kept.create(_kept_key(self.last.number + 1, self.last.digest), data)

    def _stored_at_next_number(self, data: bytes) -> ChainEntry:
        """The entry that has the next number in run storage, once `data` was offered for it."""
        key = entry_key(self.last.number + 1)
        return entry_from(self.last.number + 1, self._objects.create(key, data), f"journal entry {key}")

    def _offer(self, objects: Objects, key: str, entry: ChainEntry) -> None:
        """Create an entry. Raises TermSuperseded if another one is there, now and in every later call: what follows an
        entry that is refused is refused too."""
        self._refuse_the_past()
        try:
            found = objects.create(key, entry.data)
            if found == entry.data:
                return
            self._superseded = entry_from(entry.number, found, entry.where).link
        except KeyUnknown as error:  # of a writer that has changed the key
            writer = Holder(f"a writer that isn't known ({error.message})", KeyUnknown.cluster)
            self._superseded = Link(entry.number, self.term + 1, "", entry.seq, writer)
        self._refuse_the_past()

    def _refuse_the_past(self) -> None:
        if self._superseded is not None:
            raise _superseded_by(self._superseded, f"term {self.term} may not write to the journal")


def _superseded_by(newest: Link, what: str) -> TermSuperseded:
    holder = newest.holder
    error = TermSuperseded(
        f"{what}: entry {newest.number} is of term {newest.term}, of {holder.process or 'another controller'}",
        unchanged="Nothing was written.",
    )
    error.cluster = holder.cluster
    return error


def _kept_key(number: int, prev: str) -> str:
    """Key of the entry of this number that follows the one with the digest `prev`."""
    return f"{FOLDER}/{number:010d}-{prev[:32]}"


def events_after(objects: Objects, seq: int = -1) -> Iterator[Event]:
    """Every event with a `seq` above this one, in order, read as they are taken. Needs no cluster.

    Raises:
        JournalCorrupt: a part of the journal is missing, can't be read, or is not the successor of the one before.
    """
    reader = ChainReader(objects)
    entries = reader.entries() if seq < 0 else _since(reader, seq + 1)
    return (event for entry in entries for event in entry.events if event["seq"] > seq)


def _since(reader: ChainReader, seq: int) -> Iterator[ChainEntry]:
    """Entries from the one that has the event of this number."""
    entries: list[ChainEntry] = []
    for entry in reader.backwards():
        entries.append(entry)
        if entry.seq <= seq:
            break
    return reversed(entries)


def read_events(objects: Objects, after: int = -1) -> list[Event]:
    """Every event with a `seq` above `after`, in order. Raises as `events_after`."""
    return list(events_after(objects, after))
