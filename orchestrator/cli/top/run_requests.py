"""Requests of the live screen to runs. They may wait for the cluster, so they are made from a thread."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.cli.terminal.format import counted
from orchestrator.errors import OrchestratorError
from orchestrator.protocol.status import RunStatus

LAG_S = 5.0  # a request shows in the run's status once the Scheduler has granted the workers


class Client(Protocol):
    """A client of the cluster that joins it in the background and reconnects by itself.

    Attributes:
        is_joining: whether it is joining the cluster: then `list` may lack runs that have ended, and the others wait.
    """

    @property
    def address(self) -> str: ...
    @property
    def is_joining(self) -> bool: ...

    def list(self) -> tuple[RunStatus, ...]: ...
    def get(self, run_id: str) -> RunStatus: ...
    def scale(self, run_id: str, workers: int | None) -> object: ...
    def pause(self, run_id: str) -> object: ...
    def stop(self, run_id: str) -> object: ...


@dataclass(frozen=True)
class Answer:
    """The outcome of a request, as text."""

    text: str
    is_error: bool = False


class RunRequests:
    """Requests to the runs of a cluster, which never raise."""

    def __init__(self, client: Client) -> None:
        self._client, self._scaling = client, threading.Lock()
        self._requested: dict[str, tuple[int, float]] = {}  # workers by run, and when

    @property
    def is_waiting(self) -> bool:
        """Whether requests wait until the client has joined the cluster."""
        return self._client.is_joining

    def scale_by(self, run_id: str, change: int) -> Answer:
        """Request more workers, or fewer."""
        return _answer(lambda: self._scale_by(run_id, change), f"{run_id}: {{}} wanted")

    def pause(self, run_id: str) -> Answer:
        return _answer(lambda: self._client.pause(run_id), f"{run_id} pauses after its current step")

    def stop(self, run_id: str) -> Answer:
        return _answer(lambda: self._client.stop(run_id), f"{run_id} ends after its current step")

    def _scale_by(self, run_id: str, change: int) -> str:
        with self._scaling:  # the next change is of what this one has requested
            wanted = self._wanted(run_id) + change
            self._client.scale(run_id, wanted)
            self._requested[run_id] = (wanted, time.monotonic())
        return counted(wanted, "worker")

    def _wanted(self, run_id: str) -> int:
        workers, time_s = self._requested.get(run_id, (0, -math.inf))
        return workers if time.monotonic() < time_s + LAG_S else self._client.get(run_id).workers_wanted


def line_of(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, OrchestratorError):
        return error.message
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _answer(action: Callable[[], object], text: str) -> Answer:
    """What the action returns may be a part of the text."""
    try:
        return Answer(text.format(action()))
    except Exception as error:  # a failed request must not end the screen
        return Answer(line_of(error), is_error=True)
