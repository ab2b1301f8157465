"""Log lines of a run's processes, read from its storage while they are written."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.log_target import FOLDER
from orchestrator.storage.objects import Objects

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d{3}")  # how a log line begins; others continue the one before


@dataclass(frozen=True)
class LogLine:
    """A log line, with those that continue it. `source` names its writer: controller, tracker, a worker's id."""

    stamp: str
    source: str
    text: str


class LogReader(Protocol):
    """Reads the lines of a run's processes, each once."""

    def sources(self) -> list[str]:
        """Processes that have written lines, sorted."""
        ...

    def read_on(self, source: str) -> list[LogLine]:
        """Lines of a process that were not read yet."""
        ...


def log_reader(run_dir: Location) -> LogReader:
    """The reader of a run's log lines, from the first ones on."""
    return _LogFiles(run_dir / FOLDER) if isinstance(run_dir, Path) else _LogParts(objects_at(run_dir))


class _LogFiles:
    """Files to which lines are appended. A line that has no end yet is read later."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[str, int] = {}

    def sources(self) -> list[str]:
        return sorted(path.stem for path in self._directory.glob("*.log"))

    def read_on(self, source: str) -> list[LogLine]:
        with (self._directory / f"{source}.log").open("rb") as file:
            file.seek(self._offsets.get(source, 0))
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offsets[source] = self._offsets.get(source, 0) + len(whole)
        return _lines_of(source, whole)


class _LogParts:
    """Objects with the lines of some seconds."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._read: set[str] = set()

    def sources(self) -> list[str]:
        return list(self._objects.names(FOLDER))

    def read_on(self, source: str) -> list[LogLine]:
        folder = f"{FOLDER}/{source}"
        keys = [key for name in self._objects.names(folder) if (key := f"{folder}/{name}") not in self._read]
        lines = [line for key in keys for line in _lines_of(source, self._objects.get(key))]
        self._read.update(keys)
        return lines


def _lines_of(source: str, whole: bytes) -> list[LogLine]:
    lines: list[LogLine] = []
    for text in whole.decode(errors="replace").splitlines():
        stamp = STAMP.match(text)
        if stamp is None and lines:
            lines[-1] = LogLine(lines[-1].stamp, source, f"{lines[-1].text}\n{text}")
        else:
            body = text[stamp.end() :].lstrip() if stamp else text
            lines.append(LogLine(stamp.group() if stamp else "", source, body))
    return lines
