"""Results that a benchmark keeps in a file, a line each, with the commit of the code that measured them. It goes on
where it was stopped; of two lines with the same settings the later one counts.

Unlike `local_training.KeptResults`, which measures anew once a source has changed, it's a file to be published.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import commit, cpu


class ResultsFile:
    """Measured figures by the settings and the processor that they belong to.

    Args:
        path: a file of JSON lines; neither it nor its directory need exist.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._code, self._cpu = path, commit(), cpu()  # of this process, whatever is checked out meanwhile
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {
            _key(line["settings"]): line["measured"] for line in map(json.loads, lines) if line["cpu"] == self._cpu
        }

    def of(self, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of these settings, which are measured if the file lacks them.

        Args:
            settings: all that the figures depend on, but for the code; JSON.
            measure: returns JSON. Numbers that aren't finite are kept as null.
        """
        key = _key(settings)
        if key not in self._known:
            measured = {what: _finite(value) for what, value in measure().items()}
            checked_out, is_dirty = self._code
            line = {
                "settings": settings,
                "measured": measured,
                "commit": checked_out,
                "dirty": is_dirty,
                "cpu": self._cpu,
            }
            with self._path.open("a") as file:
                print(json.dumps(line, allow_nan=False), file=file)
            self._known[key] = measured
        return self._known[key]


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
