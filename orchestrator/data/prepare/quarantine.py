"""Quarantine of bad records: JSON lines with the location and fault of each, never its content.

    {"source": "books", "file": "/data/books/a.jsonl", "line": 17, "reason": "not UTF-8: byte 0xe9"}

`line` counts from 1; in Parquet and Arrow it is the row. Files without any text are listed too, but count as empty, not
as bad.
"""

import json
from pathlib import Path
from typing import IO

from orchestrator.errors import DataError
from orchestrator.storage.atomic import replacing

SHOWN = 3  # reasons in an error
REFUSED = "quarantine.jsonl"
NO_TEXT = "no text in this file"


class Quarantine:
    """Collects bad records while a corpus is read.

    Args:
        scratch: holds the lines until the name of their store is known.
        directory: gets the lines if there are too many for a store.
    """

    def __init__(self, scratch: IO[str], directory: Path) -> None:
        self._scratch, self._directory = scratch, directory
        self._first: list[str] = []
        self._num_lines = 0
        self.num_bad = 0

    def add(self, source: str, file: Path, line: int, reason: str) -> None:
        """Add a bad record."""
        self._write(source, file, line, reason)
        self.num_bad += 1
        if len(self._first) < SHOWN:
            self._first.append(f"{file}:{line}: {reason}")

    def note_empty(self, source: str, file: Path) -> None:
        self._write(source, file, 1, NO_TEXT)

    def save(self, path: Path) -> Path | None:
        """Write the lines to `path` atomically; without lines, remove the file and return None."""
        if not self._num_lines:
            path.unlink(missing_ok=True)
            return None
        self._scratch.seek(0)
        with replacing(path) as file:
            for line in self._scratch:
                file.write(line.encode("ascii"))
        return path

    def check(self, num_records: int, max_bad: float) -> None:
        """Raises DataError if the share of bad records exceeds `max_bad`, after saving all lines."""
        if self.num_bad <= max_bad * num_records:
            return
        saved = self.save(self._directory / REFUSED)
        raise DataError(
            f"{self.num_bad} of {num_records} records are bad, more than max_bad {max_bad:g} allows: "
            + "; ".join(self._first)
            + ("; …" if self.num_bad > len(self._first) else ""),
            remedy=f"{saved} names them all: mend them, or raise max_bad to leave them out.",
            unchanged="No store was written.",
        )

    def _write(self, source: str, file: Path, line: int, reason: str) -> None:
        entry = {"source": source, "file": str(file), "line": line, "reason": reason}
        self._scratch.write(json.dumps(entry) + "\n")
        self._num_lines += 1
