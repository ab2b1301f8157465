"""Results that a benchmark keeps in a file, a line each, with the commit of the code that measured them. It goes on
where it was stopped; of two lines with the same settings the later one counts."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import commit, cpu, say


class ResultsFile:
    """Measured figures by the settings that they belong to.

    Args:
        path: a file of JSON lines; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {_key(line["settings"]): line["measured"] for line in map(json.loads, lines)}

    def of(self, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of these settings, which are measured if the file lacks them.

        Args:
            settings: all that the figures depend on, but for the code; JSON.
            measure: returns JSON.
        """
        key = _key(settings)
        if key not in self._known:
            measured = dict(measure())
            checked_out, is_dirty = commit()
            line = {"settings": settings, "measured": measured, "commit": checked_out, "dirty": is_dirty, "cpu": cpu()}
            with self._path.open("a") as file:
                print(json.dumps(line, allow_nan=False), file=file)
            self._known[key] = measured
            say(f"{key}: {measured}")
        return self._known[key]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)
