"""Data of the live screen: polls of a cluster, which never raise.

They may wait for the cluster, so they are made from a thread, which also imports this module: it takes a second beside
a run on all cores, and the first screen doesn't need it.
"""

import time
from collections import deque
from contextlib import suppress
from typing import Any

from orchestrator.cli.top.look import Look, RunRecords
from orchestrator.cli.top.run_requests import Client, line_of
from orchestrator.errors import OrchestratorError
from orchestrator.policy.report.report import report_of
from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.base import is_internal
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_history import read_entries
from orchestrator.storage.backends.location import Location, location_of
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.journal import read_events

MOST_RECORDS, MOST_EVENTS = 4096, 1000  # the newest
GOODPUT_EVERY_S = 5.0  # or less often, since reading a whole journal may take long:
GOODPUT_REST = 20  # times the duration of the last reading


class JournalTail:
    """Incremental reader of a run's journal. A journal that can't be read has nothing new."""

    def __init__(self, run_dir: Location) -> None:
        self._run_dir, self._seq = run_dir, -1
        self.events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self.steps: deque[StepRecord] = deque(maxlen=MOST_RECORDS)

    def read(self) -> None:
        with suppress(OSError, ValueError, OrchestratorError):
            for event in read_events(run_objects(self._run_dir), self._seq):
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
    """Polls one cluster.

    Args:
        statuses: what is known of its runs before the first poll.
    """

    def __init__(self, client: Client, statuses: tuple[RunStatus, ...]) -> None:
        self._client, self._last = client, statuses
        self._tails: dict[str, JournalTail] = {}
        self._read: dict[str, RunStatus] = {}  # as they were when their journals were read last
        self._goodput: dict[str, float | None] = {}
        self._goodput_due_s: dict[str, float] = {}

    def look(self, opened: str | None) -> Look:
        """Poll all runs, with the records of the run that is `opened`."""
        trouble, is_joining = "", self._client.is_joining
        try:
            self._last = tuple(self._client.list())
        except Exception as error:  # the next poll tries again
            trouble = line_of(error)
        newest = {}
        for status in self._last:
            tail = self._tail(status)
            if not status.phase.ended or status != self._read.get(status.run_id):
                tail.read()
                self._read[status.run_id] = status
            if tail.events:
                newest[status.run_id] = tail.events[-1]
        shown = next((status for status in self._last if status.run_id == opened), None)
        records = self._records(shown) if shown is not None else RunRecords()
        return Look(self._client.address, self._last, is_joining, trouble, newest, records)

    def _tail(self, status: RunStatus) -> JournalTail:
        return self._tails.setdefault(status.run_id, JournalTail(location_of(status.run_dir)))

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
        return report_of(status.run_id, read_entries(location_of(status.run_dir), leave_out=(StateDecided,))).goodput
    except (OSError, ValueError, OrchestratorError):  # it can't be read from here, or holds nothing yet
        return None
