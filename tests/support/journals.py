"""Compaction of journals in tests, by limits so small that a journal of some dozens of entries has merged histories."""

import json
from collections.abc import Sequence

from orchestrator.storage.chain import BEGINNING, Event, Link
from orchestrator.storage.chain_reader import ChainReader
from orchestrator.storage.compaction import CompactionLimits, compact, merge_histories
from orchestrator.storage.journal import read_events
from orchestrator.storage.objects import Objects
from orchestrator.storage.tasks import StorageTask

LIMITS = CompactionLimits(entries=4, num_bytes=2**20, merged=2)
DUE = 4  # entries that make a compaction due


class SeqFold:
    """Numbers of all events."""

    def __init__(self, stored: bytes | None) -> None:
        self.seqs: list[int] = [] if stored is None else json.loads(stored)

    def take(self, events: Sequence[Event]) -> None:
        self.seqs += [event["seq"] for event in events]

    def stored(self) -> bytes:
        return json.dumps(self.seqs).encode()


def compaction(objects: Objects, own: Link) -> StorageTask[None]:
    yield from compact(objects, own, SeqFold, LIMITS)
    yield from merge_histories(objects, LIMITS)


def check_journal(objects: Objects, written: Sequence[Event]) -> None:
    """All ways to read the journal give the events that were written."""
    written = list(written)
    assert read_events(objects) == written
    assert [e for entry in ChainReader(objects).backwards() for e in reversed(entry.events)] == written[::-1]
    for seq in {-1, 0, len(written) // 2, len(written) - 2, len(written) - 1, len(written) + 5}:
        assert read_events(objects, seq) == [event for event in written if event["seq"] > seq]
    assert started(objects).seqs == [event["seq"] for event in written]


def started(objects: Objects) -> SeqFold:
    """What a controller's start reads."""
    reader = ChainReader(objects)
    state = reader.newest_state()
    fold = SeqFold(state.fold if state else None)
    for entry in reader.entries(state.link if state else BEGINNING):
        fold.take(entry.events)
    return fold
