"""History of a run from its outbox: curves and events for its charts and its table of events."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.protocol.expert_load import Loads

CURVES = ("train/loss", "eval/loss", "elastic/world_size")
TABLE_FILE = "events.json"
MOST_POINTS = 4000  # per curve in a chart: more than its pixels

Curve = tuple[tuple[int, float], ...]  # (step, value), ascending


@dataclass(frozen=True)
class RunEvent:
    """One event of the journal. `step` is the newest known step if the event has none of its own."""

    seq: int
    step: int
    time: float
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class History:
    curves: Mapping[str, Curve]
    events: tuple[RunEvent, ...]
    loads: Mapping[int, Loads] = field(default_factory=dict)  # by step, of its experts


def read_history(db: sqlite3.Connection) -> History:
    """Read the history. Curves with too many points are thinned out evenly, but keep changes of the world size."""
    events = []
    for seq, step, body in db.execute("SELECT seq, step, body FROM events ORDER BY seq"):
        fields = json.loads(body)
        events.append(RunEvent(seq, step, float(fields.pop("time", 0.0)), fields.pop("kind"), fields))
    loads = {step: json.loads(body) for step, body in db.execute("SELECT step, body FROM loads")}
    return History({name: _curve(db, name) for name in CURVES}, tuple(events), loads)


def _curve(db: sqlite3.Connection, name: str) -> Curve:
    count, newest = db.execute("SELECT count(*), max(step) FROM curves WHERE name = ?", (name,)).fetchone()
    stride = max(1, -(-count // MOST_POINTS))
    rows = db.execute(
        "SELECT step, value FROM (SELECT step, value, lag(value) OVER (ORDER BY step) AS before FROM curves"
        " WHERE name = ?1) WHERE step % ?2 = 0 OR step = ?3 OR (?4 AND value IS NOT before) ORDER BY step",
        (name, stride, newest, name == "elastic/world_size"),
    )
    return tuple((int(step), float(value)) for step, value in rows if value is not None)


def rows_of(history: History) -> list[list[str | int]]:
    """The events as a table, its heading first."""
    rows: list[list[str | int]] = [["time", "step", "event", "details"]]
    for event in history.events:
        moment = datetime.fromtimestamp(event.time, UTC).isoformat(sep=" ", timespec="seconds")
        details = ", ".join(f"{key} {_short(value)}" for key, value in event.fields.items() if _is_told(key, value))
        rows.append([moment.removesuffix("+00:00"), event.step, event.kind, details])
    return rows


def write_table(history: History, directory: Path) -> Path:
    """Write the events in the table format of MLflow's UI. Returns the path."""
    head, *rows = rows_of(history)
    path = directory / TABLE_FILE
    path.write_text(json.dumps({"columns": head, "data": rows}))
    return path


def _is_told(key: str, value: object) -> bool:
    return value is not None and key not in ("seq", "term", "step", "token", "traceback")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
