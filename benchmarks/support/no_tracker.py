"""What takes a tracker's place in a run that isn't tracked."""

from collections.abc import Mapping
from typing import Any

from orchestrator.tracking.sink import TrackerSetup


class NoTracker:
    """Takes what `orchestrator.tracking.tracker:Tracker` takes, and does nothing with it."""

    def __init__(self, setup: TrackerSetup) -> None:
        self._position = -1

    def position(self) -> int:
        return self._position

    def publish(self, epoch: int, points: list[Any], after: int | None = None) -> None:
        if after is not None:
            self._position = max(self._position, *(point.step for point in points))

    def event(self, epoch: int, fields: Mapping[str, Any], points: list[Any]) -> None: ...

    def inputs(self, epoch: int, datasets: tuple[Any, ...]) -> None: ...

    def artifact(self, epoch: int, path: str) -> None: ...

    def finish(self, epoch: int, outcome: str, reason: str = "", timeout_s: float = 30.0) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {"url": "", "error": "", "position": self._position}
