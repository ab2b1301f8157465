"""Reader of a run's journal that shares no code with the product.

    RUN/journal/0000000042                            entry 42, JSON: term, prev, seq, events
    RUN/journal/state-0000000511                      a line of JSON on entry 511, and a line of what they all come to
    RUN/journal/history-0000000000-0000000511.gz      entries 0 to 511, a line each

`prev` is the SHA-256 of the entry before, `seq` the number of the entry's first event.
"""

import gzip
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

LOOKS, LOOK_AGAIN_S = 50, 0.1  # for an entry that compaction may be moving

Event = dict[str, Any]


@dataclass
class Chain:
    """Entries in order, each checked against the one before. `faults` is empty if all are as they should be."""

    number: int = -1  # of the newest entry
    digest: str = ""
    term: int = 0
    next_seq: int = 0
    events: list[Event] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)  # by entry, what a state that ends with it holds
    faults: list[str] = field(default_factory=list)

    def add(self, data: bytes) -> None:
        """Check and take the next entry."""
        self.number += 1
        try:
            entry = json.loads(data)
            term, prev, seq, events = entry["term"], entry["prev"], entry["seq"], entry["events"]
        except (ValueError, KeyError, TypeError) as error:
            self._fault(f"can't be read: {error!r}")
            return
        if prev != self.digest:
            self._fault(f"follows {prev[:12]}, and the one before is {self.digest[:12]}")
        if term < self.term:
            self._fault(f"is of term {term}, after term {self.term}")
        if not events and term == self.term:
            self._fault(f"takes term {term} again")
        if events and term > self.term:
            self._fault(f"has events of term {term}, which was not taken")
        if seq != self.next_seq:
            self._fault(f"begins with event {seq}, not {self.next_seq}")
        for number, event in enumerate(events, seq):
            if (event["seq"], event["term"]) != (number, term):
                self._fault(f"has event {event['seq']} of term {event['term']} in place of {number} of {term}")
        self.term, self.digest, self.next_seq = term, sha256(data).hexdigest(), seq + len(events)
        self.events += events
        self.links.append({"number": self.number, "term": term, "digest": self.digest, "next_seq": self.next_seq})

    def _fault(self, what: str) -> None:
        self.faults.append(f"journal entry {self.number} {what}")


class Follower:
    """Reads on in a journal that is written and compacted meanwhile."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "journal"
        self.chain = Chain()

    def look(self) -> None:
        """Take the entries that are new."""
        for data in self._following():
            self.chain.add(data)

    def _following(self) -> Iterator[bytes]:
        newest = self._newest()
        looks = LOOKS
        while self.chain.number < newest and looks:
            looks -= 1
            for data in self._from(self.chain.number + 1):
                looks = LOOKS
                yield data
            if self.chain.number < newest:
                time.sleep(LOOK_AGAIN_S)
        if self.chain.number < newest:
            self.chain.faults.append(f"journal entry {self.chain.number + 1} is missing, and {newest} is there")

    def _newest(self) -> int:
        if not self._folder.is_dir():
            return -1
        names = [path.name for path in self._folder.iterdir()]
        numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"(?:state-)?(\d{10})", name))]
        return max(numbers, default=-1)

    def _from(self, number: int) -> Iterator[bytes]:
        """Entries from this one that are there as files or in one history."""
        held = self._in_history(number)
        yield from held
        number += len(held)
        while (data := _read(self._folder / f"{number:010d}")) is not None:
            yield data
            number += 1

    def _in_history(self, number: int) -> list[bytes]:
        for path in self._folder.glob("history-*.gz"):
            first, last = (int(text) for text in path.name.removesuffix(".gz").split("-")[1:])
            if first <= number <= last and (packed := _read(path)) is not None:
                return gzip.decompress(packed).split(b"\n")[number - first : last - first + 1]
        return []


def whole_chain(run_dir: Path) -> Chain:
    """The whole journal, read from its beginning, with its newest state compared."""
    follower = Follower(run_dir)
    follower.look()
    chain = follower.chain
    found = max((run_dir / "journal").glob("state-*"), default=None)
    if found is not None and not chain.faults:
        head = json.loads(found.read_bytes().partition(b"\n")[0])
        link = chain.links[head["number"]]
        chain.faults += [
            f"{found.name} has {k} {head[k]}, not {value}" for k, value in link.items() if head[k] != value
        ]
    return chain


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
