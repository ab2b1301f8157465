"""Conversion of a journal's JSON objects to events."""

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.events import generations, notices, run, training, workers
from orchestrator.protocol.events.base import KINDS, STAMPS, Event, JournalEntry

MODULES = (run, workers, generations, training, notices)  # importing them registers their kinds


def entry_of(plain: Mapping[str, Any]) -> JournalEntry:
    """The entry of a JSON object.

    Raises:
        ProtocolError: unknown kind, a missing stamp, or fields that don't match the kind.
    """
    kind = plain.get("kind")
    if kind not in KINDS:
        raise ProtocolError(f"{kind!r} is no kind of event; was it written by another version?")
    try:
        seq, term, time_s = int(plain["seq"]), int(plain["term"]), float(plain["time"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"event {kind} lacks a stamp: {error}") from error
    fields = {key: value for key, value in plain.items() if key not in STAMPS}
    return JournalEntry(seq, term, time_s, from_plain(KINDS[kind], fields))


def event_types() -> Iterator[type[Event]]:
    """Every event class in this folder, sorted by kind."""
    here = __name__.rpartition(".")[0]
    yield from (cls for _, cls in sorted(KINDS.items()) if cls.__module__.startswith(here))
