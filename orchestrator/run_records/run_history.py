"""History of a run, read from its journal: all that any incarnation of its controller needs to continue."""

import json
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.errors import ProtocolError
from orchestrator.policy.health.expert_collapse import Troubles
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, absorb
from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.events.base import KINDS, Event, JournalEntry, is_internal
from orchestrator.protocol.events.notices import (
    GradientSaturated,
    NumericsDiffer,
    NumericsRecorded,
    StorageFails,
    StorageWorks,
)
from orchestrator.protocol.events.reading import entry_of
from orchestrator.protocol.events.run import Ended, Resumed, Submitted
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords
from orchestrator.run_records.prepared_data import DataPrepared, PreparedData
from orchestrator.run_records.rollback import progress_up_to
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.chain import BEGINNING, damaged
from orchestrator.storage.chain_reader import ChainReader
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.journal import events_after
from orchestrator.storage.objects import Objects

log = logging.getLogger("orchestrator.control")

LEDGER = (StepsCommitted, Resumed)  # events that determine the committed steps
WRITE_AGAIN_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class StoredHistory:
    """A `RunHistory` as compaction stores it, with kinds in place of event classes."""

    state: RunState
    progress: Progress
    data: PreparedData | None
    times: dict[str, float]
    newest_times: dict[str, float]
    counts: dict[str, int]
    numerics: dict[str, Any] | None
    differing: dict[str, dict[str, str]]
    first_steps: dict[str, int]
    saturated: tuple[tuple[str, int], ...]
    troubles: Troubles
    resumed_by: str
    job_sha256: str
    code: dict[str, str] | None
    storage: StorageCondition
    checkpoints: CheckpointRecords


class RunHistory:
    """State and progress of a run, read from its journal. Needs no cluster, writes nothing.

    Args:
        is_read: False for that of no events, which `restore` and `take` change.
        objects: the run's records, in run storage; None for those at its location.
    """

    def __init__(
        self, run_dir: Location, limits: RunLimits, is_read: bool = True, objects: Objects | None = None
    ) -> None:
        self._run_dir = run_dir
        self._objects = objects or run_objects(run_dir)
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
        self.job_sha256 = ""  # digest of the job's file, as it was submitted
        self.code: dict[str, str] | None = None  # digests of the job's own code; None: as it was submitted
        self.storage = StorageCondition.WELL  # by the newest event
        self.checkpoints = CheckpointRecords()
        self.compacted = -1  # number of the newest journal entry that a state included when it was read
        if is_read:
            self._read()

    def _read(self) -> None:
        """Recall the newest state, and the entries after it."""
        reader = ChainReader(self._objects)
        state = reader.newest_state()
        if state is not None:
            self.compacted = state.link.number
            try:
                self.restore(state.fold)
            except (ProtocolError, ValueError) as error:
                raise damaged(state.key, f"can't be read: {error}") from error
        for entry in reader.entries(BEGINNING if state is None else state.link):
            self.take(entry.events)

    def restore(self, stored: bytes) -> None:
        """Become the history that was `stored`. Raises ProtocolError if another version has."""
        found = from_plain(StoredHistory, json.loads(stored))
        self.state, self.progress, self.data = found.state, found.progress, found.data
        self.times = {_type_of(kind): time_s for kind, time_s in found.times.items()}
        self.newest_times = {_type_of(kind): time_s for kind, time_s in found.newest_times.items()}
        self.counts = Counter({_type_of(kind): count for kind, count in found.counts.items()})
        self.numerics, self.differing, self.first_steps = found.numerics, found.differing, found.first_steps
        self.saturated, self.troubles = set(found.saturated), found.troubles
        self.resumed_by, self.job_sha256, self.code = found.resumed_by, found.job_sha256, found.code
        self.storage, self.checkpoints = found.storage, found.checkpoints

    def stored(self) -> bytes:
        """The history as a line of JSON."""
        plain = StoredHistory(
            state=self.state,
            progress=self.progress,
            data=self.data,
            times={cls.kind: time_s for cls, time_s in self.times.items()},
            newest_times={cls.kind: time_s for cls, time_s in self.newest_times.items()},
            counts={cls.kind: count for cls, count in self.counts.items()},
            numerics=self.numerics,
            differing=self.differing,
            first_steps=self.first_steps,
            saturated=tuple(sorted(self.saturated)),
            troubles=self.troubles,
            resumed_by=self.resumed_by,
            job_sha256=self.job_sha256,
            code=self.code,
            storage=self.storage,
            checkpoints=self.checkpoints,
        )
        return json.dumps(to_plain(plain), separators=(",", ":")).encode()

    def take(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Add the journal's next events."""
        for plain in events:
            self._recall(entry_of(plain))

    def _recall(self, entry: JournalEntry) -> None:
        self._enter(entry)
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
                self._go_back(resumed, progress_up_to(self._objects, self.progress, resumed.step, before=entry.seq))
            case StorageFails(condition):
                self.storage = condition
            case StorageWorks():
                self.storage = StorageCondition.WELL
            case event:
                self.troubles = self.troubles.after(event)

    def _become(self, state: RunState) -> None:
        self.state = state
        for worker in state.members:
            self.first_steps.setdefault(worker, self.progress.watermark + 1)

    def _enter(self, entry: JournalEntry) -> None:
        """Date an event, and note which checkpoints there are after it."""
        self.checkpoints = self.checkpoints.after(entry.event)
        if isinstance(entry.event, Submitted) and not self.job_sha256:
            self.job_sha256 = entry.event.job_sha256
        kind = type(entry.event)
        self.times.setdefault(kind, entry.time)
        self.newest_times[kind] = entry.time
        self.counts[kind] += 1

    def _go_back(self, event: Resumed, progress: Progress) -> None:
        """Take back progress after the checkpoint that the run resumed from: those steps are repeated."""
        self.resumed_by, self.code = event.token, event.code or self.code
        self.times.pop(Ended, None)
        self.progress = progress
        self.first_steps = {w: step for w, step in self.first_steps.items() if step <= self.progress.watermark}
        self.troubles = self.troubles.up_to(self.progress.watermark)


def _type_of(kind: str) -> type[Event]:
    if kind not in KINDS:
        raise ProtocolError(f"{kind!r} is no kind of event; was it written by another version?")
    return KINDS[kind]


def entries_after(
    run_dir: Location, seq: int = -1, only: Collection[type[Event]] = (), leave_out: Collection[type[Event]] = ()
) -> Iterator[JournalEntry]:
    """The events of a run's journal with a `seq` above this one, in order, read as they are taken. Needs no cluster.

    Args:
        only: types of events; empty for all.
        leave_out: types to skip: states take long to read.
    """
    wanted, unwanted = {cls.kind for cls in only}, {cls.kind for cls in leave_out}
    for plain in events_after(run_objects(run_dir), seq):
        if (not wanted or plain["kind"] in wanted) and plain["kind"] not in unwanted:
            yield entry_of(plain)


def read_entries(
    run_dir: Location, after: int = -1, only: Collection[type[Event]] = (), leave_out: Collection[type[Event]] = ()
) -> list[JournalEntry]:
    """All that `entries_after` reads."""
    return list(entries_after(run_dir, after, only, leave_out))


def read_code(run_dir: Location, job: JobSpec) -> dict[str, str]:
    """Digests of the packages of the job's own code that the run uses now, by their directories."""
    found = read_entries(run_dir, only=(Resumed,)) if job.code else []
    given = [entry.event.code for entry in found if isinstance(entry.event, Resumed) and entry.event.code]
    return given[-1] if given else job.code


def read_steps(run_dir: Location) -> list[StepRecord]:
    """All committed steps of the run, in order. Needs no cluster."""
    return committed_steps(entries_after(run_dir, only=LEDGER))


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


def user_events(run_dir: Location, after: int = -1) -> list[dict[str, Any]]:
    """Events of the run as JSON objects, without the controller's internal ones. Needs no cluster."""
    return [plain for plain in events_after(run_objects(run_dir), after) if not is_internal(plain["kind"])]
