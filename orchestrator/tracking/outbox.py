"""Outbox of a run: items that the tracker has not taken yet, and its history (`orchestrator.tracking.outbox_file`).

Items are on disk when a `put…` method returns. A metric has one value per step even if steps are replayed or sent
again: repeats are dropped here, and items that are sent twice because a process died in between have identical bits, so
the tracker keeps one.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.events.base import JournalEntry, plain_of_entry
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsDeleted
from orchestrator.protocol.expert_load import Loads
from orchestrator.tracking.history import CURVES, History, read_history
from orchestrator.tracking.outbox_file import open_outbox_file
from orchestrator.tracking.sinks.sink import (
    Artifact,
    Checkpoint,
    CheckpointMark,
    Fate,
    Finish,
    Inputs,
    Item,
    MetricPoint,
    TrackerPosition,
)

_KINDS: Mapping[str, type[Any]] = {
    kind.__name__: kind for kind in (MetricPoint, Artifact, Inputs, Checkpoint, CheckpointMark, Finish)
}
_POSITION = "(steps)"  # key in `taken`: the newest step up to which no values are missing
_JOINED = "(joined)"  # key in `taken`: set once `join` has compared the outbox with the tracker


class Outbox:
    """Durable queue and history of one run. Thread-safe.

    Raises:
        NotFinished: another process holds the file.
        sqlite3.Error, OSError: it can't be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self._lock = threading.Lock()
        self._db = open_outbox_file(directory)
        self._num_waiting = int(self._one("SELECT count(*) FROM waiting"))

    # -- writing -----------------------------------------------------------------------------------------------

    def put(self, items: Sequence[Item]) -> None:
        with self._writing():
            self._append(items)

    def put_points(
        self, points: Sequence[MetricPoint], after: int | None = None, loads: Mapping[int, Loads] = {}
    ) -> None:
        """Put values. A value whose metric has one for the same or a later step is a repeat and is dropped.

        Args:
            after: the points are those of all steps after this one, up to their newest.
            loads: expert loads by step. The first loads of a step are kept.

        Raises:
            ProtocolError: values of earlier steps are missing; nothing was put.
        """
        with self._writing():
            if after is not None and after > self._newest(_POSITION):
                raise ProtocolError(
                    f"values of the steps after {after} came, but those after {self._newest(_POSITION)} are missing",
                    unchanged="Nothing was put.",
                )
            fresh = self._fresh(points)
            self._append(fresh)
            curves = [(p.name, p.step, p.value, p.time) for p in fresh if p.name in CURVES]
            self._db.executemany("INSERT OR IGNORE INTO curves VALUES (?, ?, ?, ?)", curves)
            rows = [(step, json.dumps(shown)) for step, shown in loads.items()]
            self._db.executemany("INSERT OR IGNORE INTO loads VALUES (?, ?)", rows)
            if after is not None and points:
                self._take(_POSITION, max(point.step for point in points))
                self._announce()

    def put_event(self, entry: JournalEntry, points: Sequence[MetricPoint] = (), after: int | None = None) -> None:
        """Put an event of the journal, with values derived from it. An event with a known `seq` is dropped.

        Args:
            after: `seq` of the run's event before it.

        Raises:
            ProtocolError: earlier events are missing; nothing was put.
        """
        with self._writing():
            newest = self._newest_event()
            if after is not None and after > newest:
                raise ProtocolError(
                    f"the event after {after} came, but those after {newest} are missing",
                    unchanged="Nothing was put.",
                )
            if self._one("SELECT count(*) FROM events WHERE seq = ?", entry.seq):
                return
            step = getattr(entry.event, "step", None)
            step = self._newest(_POSITION) if step is None else step
            self._db.execute(
                "INSERT INTO events (seq, step, body) VALUES (?, ?, ?)",
                (entry.seq, step, json.dumps(plain_of_entry(entry))),
            )
            self._append(points)
            self._announce()

    def put_finish(self, end: Finish) -> None:
        """Put the end of the run, replacing one that is waiting."""
        with self._writing():
            self._announce(all_of_them=True)
            self._withdraw_finish()
            self._append([end])

    def withdraw_finish(self) -> None:
        """Remove a waiting end: the run goes on."""
        with self._writing():
            self._withdraw_finish()

    # -- sending -----------------------------------------------------------------------------------------------

    def head(self, limit: int) -> tuple[int, list[Item]]:
        """Next items to send: up to `limit` values that precede any other item, or else the one item at the head.

        Returns:
            a number for `remove`, and the items; empty if nothing is waiting.
        """
        with self._lock:
            rows = self._db.execute("SELECT id, kind, body FROM waiting ORDER BY id LIMIT ?", (limit,)).fetchall()
        is_points = [kind == MetricPoint.__name__ for _, kind, _ in rows]
        count = is_points.index(False) if False in is_points else len(rows)
        chosen = rows[: max(count, 1)]
        items = [_read(kind, body) for _, kind, body in chosen]
        return (chosen[-1][0] if chosen else -1), items

    def remove(self, number: int) -> None:
        """Remove all items up to `number`: the tracker has taken them."""
        with self._writing():
            self._num_waiting -= self._db.execute("DELETE FROM waiting WHERE id <= ?", (number,)).rowcount

    def join(self, newest: Mapping[str, int]) -> None:
        """Drop values that the tracker has already, now and in later puts. Runs once in the life of the file."""
        with self._writing():
            if self._newest(_JOINED) >= 0:
                return
            for key, step in newest.items():
                self._take(key, max(step, self._newest(key)))
            rows = self._db.execute("SELECT id, body FROM waiting WHERE kind = 'MetricPoint'").fetchall()
            points = ((number, from_plain(MetricPoint, json.loads(body))) for number, body in rows)
            known = [(number,) for number, point in points if point.step <= newest.get(point.key, -1)]
            self._db.executemany("DELETE FROM waiting WHERE id = ?", known)
            self._num_waiting -= len(known)
            self._take(_JOINED, 0)

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def position(self) -> TrackerPosition:
        """The newest step up to which values of every step were put, and the newest event."""
        with self._lock:
            return TrackerPosition(self._newest(_POSITION), self._newest_event())

    def history(self) -> History:
        with self._lock:
            return read_history(self._db)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # -- internal ----------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            before = self._num_waiting
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                self._num_waiting = before
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _append(self, items: Sequence[Item]) -> None:
        rows = [(type(item).__name__, json.dumps(to_plain(item))) for item in items]
        self._db.executemany("INSERT INTO waiting (kind, body) VALUES (?, ?)", rows)
        self._num_waiting += len(rows)

    def _fresh(self, points: Sequence[MetricPoint]) -> list[MetricPoint]:
        newest: dict[str, int] = {}
        fresh = []
        for point in points:
            if point.step > newest.setdefault(point.key, self._newest(point.key)):
                newest[point.key] = point.step
                fresh.append(point)
        for key, step in newest.items():
            self._take(key, step)
        return fresh

    def _announce(self, all_of_them: bool = False) -> None:
        """Queue checkpoints for the tracker, in order, once the values of their steps are here."""
        rows = self._db.execute("SELECT seq, step, body FROM events WHERE NOT announced ORDER BY seq").fetchall()
        for seq, step, body in rows:
            entry = entry_of(json.loads(body))
            if isinstance(entry.event, CheckpointCommitted) and step > self._newest(_POSITION) and not all_of_them:
                return
            self._append(self._items_of(entry))
            self._db.execute("UPDATE events SET announced = 1 WHERE seq = ?", (seq,))

    def _items_of(self, entry: JournalEntry) -> list[Item]:
        match entry.event:
            case CheckpointCommitted(step, path):
                values = (self._value_at(name, step) for name in ("train/loss", "eval/loss"))
                points = tuple(value for value in values if value is not None)
                return [Checkpoint(entry.seq, step, path, points)]
            case CheckpointsDeleted(steps):
                return [CheckpointMark(Fate.DELETED, steps=steps)]
            case Resumed(step=step) | RolledBack(step=step):
                return [CheckpointMark(Fate.SUPERSEDED, after=step)]
        return []

    def _value_at(self, name: str, step: int) -> MetricPoint | None:
        query = "SELECT step, value, time FROM curves WHERE name = ? AND step <= ? ORDER BY step DESC LIMIT 1"
        row = self._db.execute(query, (name, step)).fetchone()
        return None if row is None or row[1] is None else MetricPoint(name, row[1], row[0], row[2])

    def _withdraw_finish(self) -> None:
        self._num_waiting -= self._db.execute("DELETE FROM waiting WHERE kind = 'Finish'").rowcount

    def _newest(self, key: str) -> int:
        row = self._db.execute("SELECT step FROM taken WHERE key = ?", (key,)).fetchone()
        return -1 if row is None else int(row[0])

    def _newest_event(self) -> int:
        return int(self._one("SELECT coalesce(max(seq), -1) FROM events"))

    def _take(self, key: str, step: int) -> None:
        self._db.execute("INSERT INTO taken VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET step = ?", (key, step, step))

    def _one(self, query: str, *values: Any) -> Any:
        return self._db.execute(query, values).fetchone()[0]


def _read(kind: str, body: str) -> Item:
    fields = json.loads(body)
    if kind == MetricPoint.__name__:  # fast path: flat, and most items
        return MetricPoint(**fields)
    item: Item = from_plain(_KINDS[kind], fields)
    return item
