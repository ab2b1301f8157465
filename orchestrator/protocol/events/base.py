"""Run events: one frozen dataclass per kind of event.

The controller appends events to the run's journal, and every view of a run is derived from them. In the journal, in
`orchestrator events -o json` and in `OrchestratorClient.events` an event is a JSON object: the fields of its dataclass,
its `kind`, and the stamps of the journal:

    {"seq": 4, "term": 1, "time": 1795679873.7, "kind": "generation_planned", "generation": 0, "members": ["w0"], ...}

Writers construct events and readers match on their types:

    match entry.event:
        case Activated(members=members): ...
        case Ended(outcome=outcome): ...
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from orchestrator.protocol.codec import to_plain

STAMPS = ("seq", "term", "time", "kind")  # keys of an event's JSON object that are not fields of its dataclass
KINDS: dict[str, type["Event"]] = {}  # all imported event classes


class Event:
    """Base class of events. Subclasses are frozen dataclasses.

    Attributes:
        kind: name in the journal; the class name in snake case unless the class statement names another.
        is_internal: bookkeeping of the controller, which `orchestrator events` omits.
    """

    kind: ClassVar[str]
    is_internal: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str | None = None, internal: bool = False) -> None:
        cls.kind = kind or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        cls.is_internal = internal
        if cls.kind in KINDS:
            raise TypeError(f"two classes of events are of kind {cls.kind}: {KINDS[cls.kind].__name__}, {cls.__name__}")
        KINDS[cls.kind] = cls


@dataclass(frozen=True)
class JournalEntry:
    """An event in the journal.

    Args:
        seq: number of the event in the run, from 0.
        term: term of the controller that wrote it.
        time: `time.time()` seconds.
    """

    seq: int
    term: int
    time: float
    event: Event


def plain_of(event: Event) -> dict[str, Any]:
    """The event as a JSON object without stamps."""
    return {"kind": event.kind, **to_plain(event)}


def plain_of_entry(entry: JournalEntry) -> dict[str, Any]:
    """The entry as a JSON object, as in the journal."""
    return {"seq": entry.seq, "term": entry.term, "time": entry.time, **plain_of(entry.event)}


def is_internal(kind: str) -> bool:
    """Whether events of this kind are bookkeeping of the controller. False for kinds of other versions."""
    return kind in KINDS and KINDS[kind].is_internal
