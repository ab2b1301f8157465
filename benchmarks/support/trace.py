"""What the processes of a baseline tell while they run, in files of one folder, and the request that they end.

A line is written by one call, so lines of several processes don't mix, and a killed one leaves whole lines.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinishedStep:
    """One rank's end of a step. `end_time` is `time.time()`."""

    step: int
    rank: int
    size: int
    pid: int
    end_time: float
    loss: float


class Trace:
    """The files in `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._steps: list[FinishedStep] = []
        self._position = 0

    def finish(self, step: FinishedStep) -> None:
        self._append("steps", json.dumps(asdict(step)))

    def steps(self) -> list[FinishedStep]:
        """All finished steps in the order in which they were told. Reads only what is new."""
        file = self._folder / "steps"
        if file.exists():
            with file.open("rb") as lines:
                lines.seek(self._position)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self._position += len(line)
                    self._steps.append(FinishedStep(**json.loads(line)))
        return list(self._steps)

    def notice(self) -> None:
        """Enter that a failure was noticed now."""
        self._append("notices", str(time.time()))

    def notice_times(self) -> list[float]:
        file = self._folder / "notices"
        return [float(line) for line in file.read_text().splitlines()] if file.exists() else []

    def stop(self) -> None:
        (self._folder / "stop").touch()

    def is_stopping(self) -> bool:
        return (self._folder / "stop").exists()

    def _append(self, name: str, line: str) -> None:
        file = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, f"{line}\n".encode())
        finally:
            os.close(file)
