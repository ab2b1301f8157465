"""What a run remembers: all that a controller needs to go on from run storage, whoever it was before.

`Recollection` is what follows from the journal, `RunMemory` that and the right to write on. Besides what users see
(`Note`s of `policy`), the journal holds

    steps     {"records": [...]}      finished steps, once each: the account that `audit` balances
    state     {"state": {...}}        the decisions so far; the newest counts
    prepared  {"data": {...}}         the token store
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.control.journal import Journal, read_events
from orchestrator.control.preparation import PreparedData
from orchestrator.errors import NotFound
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.progress import Progress, absorb
from orchestrator.policy.run_state import Note, RunState
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import StepRecord
from orchestrator.protocol.status import RunStatus

INTERNAL = ("state", "steps", "prepared")  # events that users don't read as events
STATUS_FILE = "status.json"


class Recollection:
    """The run's state and progress as its journal tells them. Needs no cluster, writes nothing."""

    def __init__(self, run_dir: Path, limits: RunLimits) -> None:
        self.state = first_state(limits)
        self.progress = Progress()
        self.data: PreparedData | None = None
        self.times: dict[str, float] = {}  # of the first event of each kind
        for event in read_events(run_dir):
            self._recall(event)

    def _recall(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        self.times.setdefault(kind, event["time"])
        if kind == "state":
            self.state = from_plain(RunState, event["state"])
        elif kind == "prepared":
            self.data = from_plain(PreparedData, event["data"])
        elif kind == "steps":
            self.progress = absorb(self.progress, [from_plain(StepRecord, plain) for plain in event["records"]])


class RunMemory(Recollection):
    """The run's state and progress, each change written down before anybody acts on it.

    Args:
        run_dir: the run's directory in run storage.
        epoch: the controller's.
    """

    def __init__(self, run_dir: Path, epoch: int, limits: RunLimits) -> None:
        self._journal = Journal(run_dir, epoch)
        super().__init__(run_dir, limits)

    def decided(self, state: RunState, notes: Sequence[Note]) -> list[dict[str, Any]]:
        """Write down a decision with what it means for users. Returns the notes as events."""
        events: list[dict[str, Any]] = [{"kind": note.kind, **note.fields} for note in notes]
        changed = [{"kind": "state", "state": to_plain(state)}] if state != self.state else []
        written = self._append(events + changed)
        self.state = state
        return written[: len(events)]

    def absorb(self, records: Sequence[StepRecord]) -> list[StepRecord]:
        """Write down steps that are new, and return them."""
        progress = absorb(self.progress, records)
        fresh = [record for record in records if record.step > self.progress.watermark]
        if fresh:
            self._append([{"kind": "steps", "records": [to_plain(record) for record in fresh]}])
            self.progress = progress
        return fresh

    def prepared(self, data: PreparedData) -> None:
        self._append([{"kind": "prepared", "data": to_plain(data)}])
        self.data = data

    def note(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write down something that no decision made. Returns it as an event."""
        (event,) = self._append([{"kind": kind, **fields}])
        return event

    def _append(self, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        written = self._journal.append(events)
        for event in written:
            self.times.setdefault(event["kind"], event["time"])
        return written


def read_steps(run_dir: Path) -> Iterator[StepRecord]:
    """Every step that the run has committed, in order. Needs no cluster."""
    for event in read_events(run_dir):
        if event["kind"] == "steps":
            yield from (from_plain(StepRecord, plain) for plain in event["records"])


def user_events(run_dir: Path, after: int = -1) -> list[dict[str, Any]]:
    """What happened to the run, without the controller's own bookkeeping. Needs no cluster."""
    return [event for event in read_events(run_dir, after) if event["kind"] not in INTERNAL]


def read_status(run_dir: Path) -> RunStatus:
    """The status with which the run ended. Raises NotFound if it hasn't."""
    try:
        return from_plain(RunStatus, json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        raise NotFound(f"{run_dir} holds no {STATUS_FILE}: no run has ended there") from None
