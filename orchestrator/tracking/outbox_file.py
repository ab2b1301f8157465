"""The sqlite file of a run's outbox, in the run's directory.

    waiting   items in order, until the tracker has taken them
    taken     the newest step of every metric that was ever put here: values of older or equal steps are repeats
    curves    points of the run's chart, kept for good
    loads     tokens of each expert in the steps that the heat map shows, kept for good
    events    the run's events, kept for good

One process at a time holds the file, until it ends.
"""

import sqlite3
from pathlib import Path

from orchestrator.errors import NotFinished

FILE = "outbox.sqlite"
LOCK_PATIENCE_S = 10.0  # a killed predecessor releases the lock at once
_TABLES = """
CREATE TABLE IF NOT EXISTS waiting (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS taken (key TEXT PRIMARY KEY, step INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS curves (name TEXT, step INTEGER, value REAL, time REAL, PRIMARY KEY (name, step))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS loads (step INTEGER PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, body TEXT NOT NULL,
    announced INTEGER NOT NULL DEFAULT 0);
"""


def open_outbox_file(directory: Path) -> sqlite3.Connection:
    """Open the file for writing, made if it isn't there. Transactions are begun and ended by the caller, in any thread.

    Raises:
        NotFinished: another process holds the file.
        sqlite3.Error, OSError: it can't be read or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(directory / FILE, timeout=LOCK_PATIENCE_S, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
    except sqlite3.OperationalError as error:
        db.close()
        if "locked" not in str(error):
            raise
        raise NotFinished(
            f"another process delivers what waits in {directory / FILE}",
            remedy="Wait for it, or for the end of the run.",
            unchanged="Nothing was changed.",
        ) from error
    return db


def num_waiting(directory: Path) -> int:
    """Number of waiting items in the outboxes of an ended run, that of `directory` and those of its folders; 0 without
    any. Raises sqlite3.Error if one is held."""
    return sum(_num_waiting(path) for path in (directory / FILE, *directory.glob(f"*/{FILE}")) if path.exists())


def _num_waiting(path: Path) -> int:
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0.5)
    try:
        return int(db.execute("SELECT count(*) FROM waiting").fetchone()[0])
    finally:
        db.close()
