"""History of a run, read from its journal: all that any incarnation of its controller needs to continue."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import NotFound
from orchestrator.policy.health.expert_collapse import Troubles
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, absorb
from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.events.base import Event, JournalEntry, is_internal
from orchestrator.protocol.events.notices import (
    GradientSaturated,
    NumericsDiffer,
    NumericsRecorded,
    StorageFails,
    StorageWorks,
)
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Ended, Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.data_preparation import DataPrepared, PreparedData
from orchestrator.storage.journal import read_events

log = logging.getLogger("orchestrator.control")

LEDGER = (StepsCommitted, Resumed)  # events that determine the committed steps
STATUS_FILE = "status.json"
WRITE_AGAIN_S = 1.0

T = TypeVar("T")


class RunHistory:
    """State and progress of a run, read from its journal. Needs no cluster, writes nothing."""

    def __init__(self, run_dir: Path, limits: RunLimits) -> None:
        self._run_dir = run_dir
        self.state = first_state(limits)
        self.progress = Progress()
        self.data: PreparedData | None = None
        self.times: dict[type[Event], float] = {}  # of the first event of each type
        self.newest_times: dict[type[Event], float] = {}  # of the newest one
        self.counts: Counter[type[Event]] = Counter()
        self.numerics: dict[str, Any] | None = None  # of its first worker, where the run is exact
        self.differing: dict[str, dict[str, str]] = {}  # by worker, how its numerics differ
        self.first_steps: dict[str, int] = {}  # by worker, the first committed step that it may have trained
        self.saturated: set[tuple[str, int]] = set()  # worker and step, as they were reported
        self.troubles = Troubles()  # of its experts
        self.resumed_by = ""  # token of the newest request to resume
        self.storage_fails = False  # by the newest event
        for entry in read_entries(run_dir):
            self._recall(entry)

    def _recall(self, entry: JournalEntry) -> None:
        self._date(entry)
        match entry.event:
            case StateDecided(state):
                self._become(state)
            case DataPrepared(data):
                self.data = data
            case StepsCommitted(records):
                self.progress = absorb(self.progress, records)
            case NumericsRecorded(fingerprint):
                self.numerics = fingerprint
            case NumericsDiffer(worker, differs):
                self.differing[worker] = differs
            case GradientSaturated(worker, step):
                self.saturated.add((worker, step))
            case Resumed() as resumed:
                self._go_back(resumed, progress_up_to(self._run_dir, resumed.step, before=entry.seq))
            case StorageFails() | StorageWorks():
                self.storage_fails = isinstance(entry.event, StorageFails)
            case event:
                self.troubles = self.troubles.after(event)

    def _become(self, state: RunState) -> None:
        self.state = state
        for worker in state.members:
            self.first_steps.setdefault(worker, self.progress.watermark + 1)

    def _date(self, entry: JournalEntry) -> None:
        kind = type(entry.event)
        self.times.setdefault(kind, entry.time)
        self.newest_times[kind] = entry.time
        self.counts[kind] += 1

    def _go_back(self, event: Resumed, progress: Progress) -> None:
        """Take back progress after the checkpoint that the run resumed from: those steps are repeated."""
        self.resumed_by = event.token
        self.times.pop(Ended, None)
        self.progress = progress
        self.first_steps = {w: step for w, step in self.first_steps.items() if step <= self.progress.watermark}
        self.troubles = self.troubles.up_to(self.progress.watermark)


def read_entries(
    run_dir: Path, after: int = -1, only: Collection[type[Event]] = (), leave_out: Collection[type[Event]] = ()
) -> list[JournalEntry]:
    """The events of a run's journal with a `seq` above `after`, in order. Needs no cluster.

    Args:
        only: types of events; empty for all.
        leave_out: types to skip: states take long to read.
    """
    wanted, unwanted = {cls.kind for cls in only}, {cls.kind for cls in leave_out}
    plain = read_events(run_dir, after)
    return [entry_of(e) for e in plain if (not wanted or e["kind"] in wanted) and e["kind"] not in unwanted]


def read_steps(run_dir: Path) -> list[StepRecord]:
    """All committed steps of the run, in order. Needs no cluster."""
    return committed_steps(read_entries(run_dir, only=LEDGER))


def committed_steps(entries: Iterable[JournalEntry]) -> list[StepRecord]:
    """Committed steps of a journal, once each: steps after a checkpoint that the run resumed from are dropped. An entry
    that storage kept, though it reported an error, may have been written again.
    """
    steps: list[StepRecord] = []
    for entry in entries:
        match entry.event:
            case StepsCommitted(records):
                steps += (record for record in records if not steps or record.step > steps[-1].step)
            case Resumed(step=step):
                steps = [record for record in steps if record.step <= step]
    return steps


def user_events(run_dir: Path, after: int = -1) -> list[dict[str, Any]]:
    """Events of the run as JSON objects, without the controller's internal ones. Needs no cluster."""
    return [plain for plain in read_events(run_dir, after) if not is_internal(plain["kind"])]


def progress_up_to(run_dir: Path, step: int, before: int | None = None) -> Progress:
    """Progress of the journalled steps up to this one, by entries with a `seq` below `before`; None for all."""
    entries = read_entries(run_dir, only=LEDGER)
    steps = committed_steps(entry for entry in entries if before is None or entry.seq < before)
    return absorb(Progress(), [record for record in steps if record.step <= step])


def read_status(run_dir: Path) -> RunStatus:
    """The run's final status. Raises NotFound if it has not ended."""
    try:
        return from_plain(RunStatus, json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        raise NotFound(f"{run_dir} holds no {STATUS_FILE}: no run has ended there") from None
