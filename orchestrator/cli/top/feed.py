"""Data of the live screen: polls of a cluster, which never raise, and requests to its runs.

All of it may wait for the cluster, so it is called from a thread.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.cli.terminal.format import counted
from orchestrator.errors import OrchestratorError, ProtocolError
from orchestrator.policy.report.report import report_of
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.base import is_internal
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_history import read_entries
from orchestrator.storage.journal import read_events

MOST_RECORDS, MOST_EVENTS = 4096, 1000  # the newest
GOODPUT_EVERY_S = 5.0  # or less often, since reading a whole journal may take long:
GOODPUT_REST = 20  # times the duration of the last reading


class Client(Protocol):
    """The methods of an `OrchestratorClient` that are used here."""

    @property
    def address(self) -> str: ...

    def list(self) -> tuple[RunStatus, ...]: ...
    def get(self, run_id: str) -> RunStatus: ...
    def scale(self, run_id: str, workers: int | None) -> DesiredRunState: ...
    def pause(self, run_id: str) -> DesiredRunState: ...
    def stop(self, run_id: str) -> DesiredRunState: ...


@dataclass(frozen=True)
class RunRecords:
    """Records of a run: its newest events and steps, and its goodput so far, if that is known."""

    events: tuple[dict[str, Any], ...] = ()
    steps: tuple[StepRecord, ...] = ()
    goodput: float | None = None


@dataclass(frozen=True)
class Look:
    """One poll of the cluster; `statuses` are those of the last one that was answered.

    Args:
        trouble: why there are no new ones; empty if there are.
        newest: the newest event by run, where there is one.
        opened: records of the run that is open.
    """

    address: str
    statuses: tuple[RunStatus, ...] = ()
    trouble: str = ""
    newest: dict[str, dict[str, Any]] = field(default_factory=dict)
    opened: RunRecords = RunRecords()


@dataclass(frozen=True)
class Answer:
    """The outcome of a request, as text."""

    text: str
    is_error: bool = False


class JournalTail:
    """Incremental reader of a run's journal. A journal that can't be read has nothing new."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._seq = run_dir, -1
        self.events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self.steps: deque[StepRecord] = deque(maxlen=MOST_RECORDS)

    def read(self) -> None:
        with suppress(OSError, ValueError, ProtocolError):
            for event in read_events(self._run_dir, self._seq):
                self._seq = event["seq"]
                self._enter(event)

    def _enter(self, event: dict[str, Any]) -> None:
        if event["kind"] in (StepsCommitted.kind, Resumed.kind):
            match entry_of(event).event:
                case StepsCommitted(records):
                    self.steps += records
                case Resumed(step=step):  # steps after the checkpoint are done again
                    self.steps = deque((s for s in self.steps if s.step <= step), maxlen=MOST_RECORDS)
        if not is_internal(event["kind"]):
            self.events.append(event)


class Feed:
    """Polls one cluster and sends requests to it.

    Args:
        client: reconnects to the cluster by itself.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._last: tuple[RunStatus, ...] = ()
        self._tails: dict[str, JournalTail] = {}
        self._goodput: dict[str, float | None] = {}
        self._goodput_due_s: dict[str, float] = {}

    def look(self, opened: str | None) -> Look:
        """Poll all runs, with the records of the run that is `opened`."""
        trouble, before = "", {status.run_id: status for status in self._last}
        try:
            self._last = tuple(self._client.list())
        except Exception as error:  # the next poll tries again
            trouble = _line(error)
        newest = {}
        for status in self._last:
            tail = self._tail(status)
            if not status.phase.ended or status != before.get(status.run_id):
                tail.read()
            if tail.events:
                newest[status.run_id] = tail.events[-1]
        shown = next((status for status in self._last if status.run_id == opened), None)
        records = self._records(shown) if shown is not None else RunRecords()
        return Look(self._client.address, self._last, trouble, newest, records)

    def scale_by(self, run_id: str, change: int) -> Answer:
        """Request more workers, or fewer."""

        def action() -> str:
            wanted = self._client.get(run_id).workers_wanted + change
            self._client.scale(run_id, wanted)
            return f"{run_id}: {counted(wanted, 'worker')} wanted"

        return _answer(action)

    def pause(self, run_id: str) -> Answer:
        def action() -> str:
            self._client.pause(run_id)
            return f"{run_id} pauses after its current step"

        return _answer(action)

    def stop(self, run_id: str) -> Answer:
        def action() -> str:
            self._client.stop(run_id)
            return f"{run_id} ends after its current step"

        return _answer(action)

    def _tail(self, status: RunStatus) -> JournalTail:
        return self._tails.setdefault(status.run_id, JournalTail(Path(status.run_dir)))

    def _records(self, status: RunStatus) -> RunRecords:
        tail, run_id = self._tail(status), status.run_id
        began_s = time.monotonic()
        if began_s >= self._goodput_due_s.get(run_id, 0.0):
            self._goodput[run_id] = _goodput(status)
            took_s = time.monotonic() - began_s
            self._goodput_due_s[run_id] = began_s + max(GOODPUT_EVERY_S, GOODPUT_REST * took_s)
        return RunRecords(tuple(tail.events), tuple(tail.steps), self._goodput[run_id])


def _goodput(status: RunStatus) -> float | None:
    try:
        return report_of(status.run_id, read_entries(Path(status.run_dir), leave_out=(StateDecided,))).goodput
    except (OSError, ValueError, OrchestratorError):  # it can't be read from here, or holds nothing yet
        return None


def _answer(action: Callable[[], str]) -> Answer:
    try:
        return Answer(action())
    except Exception as error:  # a failed request must not end the screen
        return Answer(_line(error), is_error=True)


def _line(error: Exception) -> str:
    if isinstance(error, OrchestratorError):
        return error.message
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
