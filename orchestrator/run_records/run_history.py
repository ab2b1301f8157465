"""History of a run: all that any incarnation of its controller needs to continue from run storage.

`RunHistory` is derived from the journal; `JournaledRun` may append to it, too.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import NotFound, StorageError
from orchestrator.policy.health.expert_collapse import Troubles
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, absorb, stages_begun
from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.events.base import Event, JournalEntry, is_internal, plain_of
from orchestrator.protocol.events.notices import (
    GradientSaturated,
    NumericsDiffer,
    NumericsRecorded,
    StorageFails,
    StorageWorks,
)
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Ended, Resumed
from orchestrator.protocol.events.training import StageBegan, StepsCommitted
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.data_preparation import DataPrepared, PreparedData
from orchestrator.storage.atomic import write_atomically
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, read_events
from orchestrator.storage.reserve import FULL, SpaceReserve

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
            case Resumed():
                self._go_back(entry.seq, entry.event)
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

    def _go_back(self, seq: int, event: Resumed) -> None:
        """Drop progress after the checkpoint that the run resumed from: those steps are repeated."""
        self.resumed_by = event.token
        self.times.pop(Ended, None)
        before = takewhile(lambda entry: entry.seq <= seq, read_entries(self._run_dir, only=LEDGER))
        self.progress = absorb(Progress(), committed_steps(before))
        self.first_steps = {w: step for w, step in self.first_steps.items() if step <= self.progress.watermark}
        self.troubles = self.troubles.up_to(self.progress.watermark)


class JournaledRun(RunHistory):
    """State and progress of a run; each change is journalled before anything acts on it.

    A failed write raises StorageError and changes nothing, so it can be tried again; `trouble` holds its reason until a
    write succeeds.

    Args:
        run_dir: the run's directory in run storage.
        journal: by `open_journal`; None for one that takes the next term now.
    """

    def __init__(self, run_dir: Path, limits: RunLimits, journal: Journal | None = None) -> None:
        self.trouble: str | None = None
        self._journal = journal or open_journal(run_dir)
        self.term = self._journal.term
        self._reserve = SpaceReserve(run_dir)
        self._reserve.tend()
        super().__init__(run_dir, limits)

    def decided(self, state: RunState, events: Sequence[Event]) -> list[JournalEntry]:
        """Journal a decision with its events for users. Returns the events' journal entries."""
        changed = [StateDecided(state)] if state != self.state else []
        written = self._append([*events, *changed])
        self._become(state)
        for entry in written:
            if isinstance(entry.event, Resumed):
                self._go_back(entry.seq, entry.event)
        return written[: len(events)]

    def absorb(self, records: Sequence[StepRecord], up_to: int) -> tuple[list[StepRecord], list[JournalEntry]]:
        """Journal steps that are new and no later than `up_to`, and the stages that begin with them. Returns the steps,
        and the stages' journal entries."""
        records = [record for record in records if record.step <= up_to]
        progress = absorb(self.progress, records)
        fresh = [record for record in records if record.step > self.progress.watermark]
        if not fresh:
            return [], []
        begun = [StageBegan(r.batch.stage, r.step, r.batch.sequence_length) for r in stages_begun(self.progress, fresh)]
        _, *written = self._append([StepsCommitted(tuple(fresh)), *begun])
        self.progress = progress
        return fresh, written

    def prepared(self, data: PreparedData) -> None:
        self._append([DataPrepared(data)])
        self.data = data

    def note(self, event: Event) -> JournalEntry:
        """Journal an event that no decision made."""
        (entry,) = self._append([event])
        return entry

    def conclude(self, status_text: str) -> None:
        """Write the run's final status."""
        with self._writing():
            self._reserve.give_up()
            write_atomically(self._run_dir / STATUS_FILE, status_text)

    def _append(self, events: Sequence[Event]) -> list[JournalEntry]:
        if not events:
            return []
        with self._writing():
            written = self._write([plain_of(event) for event in events])
        self._reserve.tend()
        stamps = ((plain["seq"], plain["term"], plain["time"]) for plain in written)
        entries = [JournalEntry(*stamp, event) for stamp, event in zip(stamps, events, strict=True)]
        for entry in entries:
            self._date(entry)
        return entries

    def _write(self, plain: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append to the journal; on a full file system, in the space that was kept for it."""
        try:
            return self._journal.append(plain)
        except OSError as error:
            if error.errno not in FULL or not self._reserve.give_up():
                raise
            log.warning("run storage %s is full: the journal goes on in the space reserved for it", self._run_dir)
            return self._journal.append(plain)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self.trouble is None:
                log.error("run storage %s can't be written: %s", self._run_dir, error)
            self.trouble = f"run storage can't be written: {error.strerror or error}"
            raise storage_error(error, self._run_dir) from error
        if self.trouble is not None:
            log.info("run storage %s can be written again", self._run_dir)
        self.trouble = None


def open_journal(run_dir: Path, holder: str = "") -> Journal:
    """Take the next term of a run; on a full file system, in the space that was kept for its journal.

    Args:
        holder: who takes it, for people that read the journal.
    """
    try:
        return Journal(DirectoryObjects(run_dir), holder)
    except OSError as error:
        if error.errno not in FULL or not SpaceReserve(run_dir).give_up():
            raise
        return Journal(DirectoryObjects(run_dir), holder)


def retry_until_written(write: Callable[[], T]) -> T:
    """The result of `write`, retried until storage works: for writes without which the run can't continue."""
    refused = ""
    while True:
        try:
            return write()
        except (StorageError, OSError) as error:
            if str(error) != refused:
                log.error("tried again until it succeeds: %s", error)
            refused = str(error)
            time.sleep(WRITE_AGAIN_S)


def storage_error(error: OSError, directory: Path) -> StorageError:
    """The error shown to users for a failed write to run storage."""
    return StorageError(
        f"run storage can't be written: {error.strerror or error}: {error.filename or directory}",
        remedy="Make it writable and make room, or name another storage in the job file.",
        unchanged="Nothing was written.",
    )


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


def read_status(run_dir: Path) -> RunStatus:
    """The run's final status. Raises NotFound if it has not ended."""
    try:
        return from_plain(RunStatus, json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        raise NotFound(f"{run_dir} holds no {STATUS_FILE}: no run has ended there") from None
