"""Reader of a journal's chain, from whichever objects hold it, while its controller appends and compacts."""

from collections.abc import Iterator

from orchestrator.errors import JournalCorrupt
from orchestrator.storage.chain import (
    BEGINNING,
    ChainEntry,
    HistoryName,
    Holder,
    Link,
    damaged,
    entry_from,
    entry_key,
    list_names,
    state_key,
)
from orchestrator.storage.compacted import JournalState, lines_of, state_from
from orchestrator.storage.objects import Objects


class ChainReader:
    """Reads the entries that are there when it is made, each checked against its successor.

    An object that is gone, or holds something else, may have been compacted meanwhile: the journal's objects are listed
    again, and the entry is read from where it is then.

    Raises:
        OSError: storage can't be read.
        JournalCorrupt: an object is missing or damaged. The methods raise both too.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._names = list_names(objects)
        self._newest = self._names.newest

    def newest_state(self) -> JournalState | None:
        """The newest state; None if the journal was never compacted."""
        while (number := self._names.newest_state) >= 0:
            try:
                return state_from(number, self._get(state_key(number), state_key(number)))
            except JournalCorrupt:
                if not self._has_changed():
                    raise
        return None

    def newest_link(self) -> Link:
        """What the next entry follows."""
        while self._newest > self._names.newest_state:
            try:
                return next(self._back_from(self._newest)).link
            except JournalCorrupt:
                if not self._has_changed():
                    raise
        state = self.newest_state()
        return BEGINNING if state is None else state.link

    def entries(self, after: Link = BEGINNING, last: int | None = None) -> Iterator[ChainEntry]:
        """Entries in order.

        Args:
            after: that of the newest state, or what the first entry follows.
            last: number of the last one; None for the newest.
        """
        last = self._newest if last is None else last
        where = state_key(after.number)
        held: ChainEntry | None = None  # until its successor is known to follow it
        while (held.number if held else after.number) < last:
            try:
                for entry in self._from(held.number + 1 if held else after.number + 1):
                    if entry.number > last:
                        break
                    before = held.link if held else after
                    _check(before, held.where if held else where, entry)
                    if held is not None:
                        after, where = held.link, held.where
                        yield held
                    held = entry
            except JournalCorrupt:
                if not self._has_changed():
                    raise
                held = None  # it is read again too
        if held is not None:
            yield held

    def backwards(self) -> Iterator[ChainEntry]:
        """Entries from the newest to the first."""
        number, successor = self._newest, None
        while number >= 0:
            try:
                for entry in self._back_from(number):
                    if successor is not None:
                        _check(entry.link, entry.where, successor)
                    number, successor = entry.number - 1, entry
                    yield entry
            except JournalCorrupt:
                if not self._has_changed():
                    raise

    def _from(self, number: int) -> Iterator[ChainEntry]:
        """Entries from this one on that are in one object."""
        if number > self._names.newest_state:
            yield self._alone(number)
            return
        history = self._history_of(number)
        for at, line in enumerate(self._lines(history), history.first):
            if at >= number:
                yield entry_from(at, line, f"journal entry {at} in {history.key}")

    def _back_from(self, number: int) -> Iterator[ChainEntry]:
        """Entries from this one back that are in one object."""
        if number > self._names.newest_state:
            yield self._alone(number)
            return
        history = self._history_of(number)
        lines = list(self._lines(history))
        for at in range(number, history.first - 1, -1):
            yield entry_from(at, lines[at - history.first], f"journal entry {at} in {history.key}")

    def _alone(self, number: int) -> ChainEntry:
        where = f"journal entry {entry_key(number)}"
        return entry_from(number, self._get(entry_key(number), where), where)

    def _history_of(self, number: int) -> HistoryName:
        history = self._names.history_of(number)
        if history is None:
            first = max((h.last + 1 for h in self._names.histories if h.last < number), default=0)
            last = min(
                (h.first - 1 for h in self._names.histories if h.first > number), default=self._names.newest_state
            )
            raise damaged(f"the history of journal entries {first} to {last}", "is missing")
        return history

    def _lines(self, history: HistoryName) -> Iterator[bytes]:
        return lines_of(history, self._get(history.key, history.key))

    def _get(self, key: str, what: str) -> bytes:
        try:
            return self._objects.get(key)
        except FileNotFoundError:
            raise damaged(what, "is missing, though later ones exist") from None

    def _has_changed(self) -> bool:
        """List the objects again. Whether compaction has changed where entries are."""
        before, self._names = self._names, list_names(self._objects)
        return (before.states, before.histories) != (self._names.states, self._names.histories)


def _check(before: Link, where: str, entry: ChainEntry) -> None:
    if entry.prev != before.digest:
        raise damaged(where, f"is not the one that entry {entry.number} follows: its SHA-256 differs")


def newest_term(objects: Objects) -> int:
    """The highest term taken so far; 0 if none was."""
    return ChainReader(objects).newest_link().term


def newest_holder(objects: Objects) -> Holder:
    """The controller that holds the highest term."""
    return ChainReader(objects).newest_link().holder


def has_journal(objects: Objects) -> bool:
    """Whether any controller has taken a term of this run. Reads no entry."""
    return list_names(objects).newest >= 0
