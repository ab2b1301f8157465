"""Compaction of a journal: its oldest entries become a state, from which a controller starts, and a history.

Objects are created and read back before what they replace is deleted, so that a process that is killed at any point
leaves a whole journal, and the next compaction removes the rest. Of two controllers that compact at once each deletes
only what the other, too, finds in larger objects.

The names of some entries stay taken, so that no past controller can append. The entry after the last one it knows of is
the first one of the next term, or, where the answer to its last append was lost, the last one of its own: the first and
the last entry of each term are kept.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.storage.chain import (
    BEGINNING,
    FOLDER,
    ChainEntry,
    Event,
    HistoryName,
    JournalNames,
    Link,
    damaged,
    entry_key,
    list_names,
    state_key,
)
from orchestrator.storage.chain_reader import ChainReader
from orchestrator.storage.compacted import JournalState, history_to_bytes, lines_of, state_to_bytes
from orchestrator.storage.objects import Objects
from orchestrator.storage.tasks import StorageTask

AT_ONCE = 32  # entries or objects in one storage call
HALF_WRITTEN = re.compile(r"\.(?:state-|history-\d{10}-)?(\d{10})(?:\.gz)?\.[0-9a-f]{8}\.partial")
LEVELS = 2  # of merged histories; more would make objects of hundreds of MB


T = TypeVar("T")


@dataclass(frozen=True)
class CompactionLimits:
    """Entries and bytes of them that make a compaction due, and are compacted at once; histories merged into one."""

    entries: int = 512
    num_bytes: int = 4 * 2**20
    merged: int = 16


LIMITS = CompactionLimits()


class Fold(Protocol):
    """What a reader makes of a journal's events, in order."""

    def take(self, events: Sequence[Event]) -> None: ...

    def stored(self) -> bytes:
        """One line of JSON, from which the same fold can be rebuilt."""
        ...


def compact(
    objects: Objects, own: Link, make_fold: Callable[[bytes | None], Fold], limits: CompactionLimits
) -> StorageTask[int]:
    """Compact the oldest entries, as many as `limits` allow at once.

    Args:
        own: of the caller's newest entry. Later ones stay: its own last append may be among them.
        make_fold: from what a fold has stored, or None for one of no events.

    Returns:
        number of the newest entry that a state includes then.
    """
    reader: ChainReader = yield partial(ChainReader, objects)
    state: JournalState | None = yield reader.newest_state
    before, kept = (state.link, state.kept) if state else (BEGINNING, ())
    entries = yield from _read(reader, before, own, limits)
    chosen = entries[: _how_many(entries, limits)]
    if not chosen:
        return before.number
    fold: Fold = yield partial(make_fold, state.fold if state else None)
    for some in _slices(chosen):
        yield partial(fold.take, [event for entry in some for event in entry.events])
    kept += _ends_of_terms(before.term, entries, len(chosen))
    yield partial(_create_history, objects, chosen)
    yield partial(_create_state, objects, chosen[-1].link, kept, fold)
    yield from _delete_compacted(objects, chosen[-1].number, frozenset(kept))
    return chosen[-1].number


def merge_histories(objects: Objects, limits: CompactionLimits) -> StorageTask[None]:
    """Merge the oldest histories of a size, if there are many, and delete those that a larger one contains.

    The newest ones stay small, for those who read the newest entries only.
    """
    names: JournalNames = yield partial(list_names, objects)
    group = _to_merge(names, limits)
    if group:
        yield partial(_create_merged, objects, group)
        names = yield partial(list_names, objects)
    for part, whole in names.contained().items():
        yield partial(_delete_contained, objects, part, whole)


def delete_half_written(run_dir: Path, last: int) -> None:
    """Delete partly written objects that killed processes have left of a journal up to entry `last`, that of the
    caller's term.

    A past controller may still be writing one: it can't be linked any more, so `create` returns the object that is
    there, or raises an OSError, after which it is created again. Raises OSError.
    """
    for path in (run_dir / FOLDER).glob(".*.partial"):
        found = HALF_WRITTEN.fullmatch(path.name)
        if found is not None and int(found[1]) <= last:
            path.unlink(missing_ok=True)


def _read(reader: ChainReader, before: Link, own: Link, limits: CompactionLimits) -> StorageTask[list[ChainEntry]]:
    """The entries to compact and, unless that is the caller's newest, the one after them."""
    last = min(own.number, before.number + limits.entries + 1)
    chain = reader.entries(before, last)
    entries: list[ChainEntry] = []
    while some := (yield partial(list, islice(chain, AT_ONCE))):
        entries += some
        if sum(len(entry.data) for entry in entries[:-1]) >= limits.num_bytes:
            break
    if entries and entries[-1].number == own.number and entries[-1].link != own:
        raise damaged(entries[-1].where, "is not what was written: its SHA-256 differs")
    return entries


def _how_many(entries: Sequence[ChainEntry], limits: CompactionLimits) -> int:
    sizes = accumulate(len(entry.data) for entry in entries[: limits.entries])
    return next(
        (count for count, size in enumerate(sizes, 1) if size >= limits.num_bytes), min(len(entries), limits.entries)
    )


def _ends_of_terms(term: int, entries: Sequence[ChainEntry], count: int) -> tuple[int, ...]:
    """Numbers of the first `count` entries that are the first or the last one of a term. `term` is that before them."""
    terms = [term, *(entry.link.term for entry in entries)]
    terms.append(terms[-1])
    return tuple(
        entry.number
        for entry, before, own, after in zip(entries[:count], terms, terms[1:], terms[2:], strict=False)
        if before != own or own != after
    )


def _create_history(objects: Objects, entries: Sequence[ChainEntry]) -> None:
    history, lines = HistoryName(entries[0].number, entries[-1].number), [entry.data for entry in entries]
    objects.create(history.key, history_to_bytes(lines))
    if list(lines_of(history, objects.get(history.key))) != lines:
        raise damaged(history.key, "is not what was written")


def _create_state(objects: Objects, link: Link, kept: tuple[int, ...], fold: Fold) -> None:
    state = JournalState(link, kept, fold.stored())
    data = state_to_bytes(state)
    objects.create(state.key, data)
    if objects.get(state.key) != data:
        raise damaged(state.key, "is not what was written")


def _delete_compacted(objects: Objects, last: int, kept: Collection[int]) -> StorageTask[None]:
    names: JournalNames = yield partial(list_names, objects)
    keys = [entry_key(number) for number in names.entries if number <= last and number not in kept]
    for some in _slices([*keys, *(state_key(number) for number in names.states if number < last)]):
        yield partial(objects.delete, some)


def _to_merge(names: JournalNames, limits: CompactionLimits) -> list[HistoryName]:
    outer = [history for history in names.histories if history not in names.contained()]
    for level in range(LEVELS):
        of_level = [history for history in outer if _level_of(history, limits) == level]
        group = of_level[: limits.merged]
        if len(of_level) >= 2 * limits.merged and all(b.first == a.last + 1 for a, b in pairwise(group)):
            return group
    return []


def _level_of(history: HistoryName, limits: CompactionLimits) -> int:
    """How often it was merged, or fewer times if its entries were few."""
    count = history.last - history.first + 1
    return next(level for level in itertools.count() if count <= limits.entries * limits.merged**level)


def _create_merged(objects: Objects, group: Sequence[HistoryName]) -> None:
    merged = HistoryName(group[0].first, group[-1].last)
    objects.create(merged.key, b"".join(objects.get(history.key) for history in group))


def _delete_contained(objects: Objects, part: HistoryName, whole: HistoryName) -> None:
    """Delete a history after comparing it with the larger one."""
    lines = lines_of(part, objects.get(part.key))
    there = islice(lines_of(whole, objects.get(whole.key)), part.first - whole.first, part.last - whole.first + 1)
    if not all(line == other for line, other in zip(lines, there, strict=True)):
        raise damaged(whole.key, f"differs from {part.key}")
    objects.delete([part.key])


def _slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[at : at + AT_ONCE] for at in range(0, len(items), AT_ONCE))
