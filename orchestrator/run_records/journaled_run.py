"""A run as its controller keeps it: state and progress, each change of which is journalled before it counts."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from orchestrator.errors import JournalCorrupt, StorageError
from orchestrator.policy.health.expert_load import is_shown
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, absorb, stages_begun
from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.events.base import Event, JournalEntry, plain_of
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StageBegan, StepsCommitted
from orchestrator.protocol.step_record import StepRecord, without_loads
from orchestrator.run_records.final_status import status_key
from orchestrator.run_records.journal_compactor import JournalCompactor
from orchestrator.run_records.prepared_data import DataPrepared, PreparedData
from orchestrator.run_records.rollback import progress_up_to
from orchestrator.run_records.run_history import RunHistory
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.signed_objects import SignedObjects
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.chain import NO_HOLDER, ChainEntry, Holder
from orchestrator.storage.compaction import LIMITS, CompactionLimits
from orchestrator.storage.condition import StorageTrouble, refusal
from orchestrator.storage.journal import Journal
from orchestrator.storage.objects import Objects
from orchestrator.storage.reserve import FULL, NoReserve, Reserve, SpaceReserve
from orchestrator.storage.tasks import Lengthy, StorageTask, Wait

log = logging.getLogger("orchestrator.control")

WRITE_AGAIN_S = 1.0
MOST_READS = 3  # of a journal that seems damaged

T = TypeVar("T")


class EntryWriter(Protocol):
    """Records journal entries in order, in other threads: stored in run storage, or kept in the cluster until then."""

    def add(self, entry: ChainEntry, stored: bool) -> Wait:
        """Record an entry, after those added before. Returns the wait for that; `stored`: until run storage has it."""
        ...


class JournaledRun(RunHistory):
    """State and progress of a run; each change is journalled before anything acts on it.

    Changes are storage tasks. Without a `writer` they store their entries themselves: one whose write fails raises
    StorageError and changes nothing, so it can be tried again. With one they wait until their entries are recorded.
    `trouble` holds why storage refused the newest write.

    Args:
        run_dir: the run's directory in run storage.
        journal: by `open_journal`; None for one that takes the next term now.
        compaction: when the journal is compacted.
        caller: makes the calls to run storage.
        objects: the run's records, in run storage; None for those at its location.
    """

    def __init__(
        self,
        run_dir: Location,
        limits: RunLimits,
        journal: Journal | None = None,
        compaction: CompactionLimits = LIMITS,
        caller: Caller = call_here,
        objects: SignedObjects | None = None,
    ) -> None:
        self.trouble: StorageTrouble | None = None
        self.writer: EntryWriter | None = None
        self.recording = -1  # the newest step that was given to the journal, which may not have it yet
        self._journal = journal or open_journal(run_dir, caller=caller)
        self.term = self._journal.term
        self._num_steps = limits.steps
        self._reserve = _reserve_at(run_dir, caller)
        self._reserve.tend()
        super().__init__(run_dir, limits, objects=objects or run_objects(run_dir, caller))
        self._caller = caller
        self.compactor = JournalCompactor(
            run_dir, limits, self._journal, self._objects, self._reserve, self.compacted, compaction
        )

    def decided(self, state: RunState, events: Sequence[Event]) -> StorageTask[list[JournalEntry]]:
        """Journal a decision with its events for users. Returns the events' journal entries."""
        changed = [StateDecided(state)] if state != self.state else []
        resumed = next((event for event in events if isinstance(event, Resumed)), None)
        progress = Progress()
        if resumed is not None:
            known = self._journal.last.next_seq  # an earlier attempt may have been stored despite its error
            progress = yield Lengthy(partial(progress_up_to, self._objects, self.progress, resumed.step, known))
        written = yield from self._append([*events, *changed])
        self._become(state)
        if resumed is not None:
            self._go_back(resumed, progress)
        return written[: len(events)]

    def absorb(
        self, records: Sequence[StepRecord], up_to: int
    ) -> StorageTask[tuple[list[StepRecord], list[JournalEntry]]]:
        """Journal steps that are new and no later than `up_to`, and the stages that begin with them. They may be
        published then, which can't be undone, so run storage has them.

        Returns:
            the steps, and the stages' journal entries.
        """
        records = [record for record in records if record.step <= up_to]
        progress = absorb(self.progress, records)
        steps = self._num_steps
        fresh = [
            record if is_shown(record.step, steps) else without_loads(record)
            for record in records
            if record.step > self.progress.watermark
        ]
        if not fresh:
            return [], []
        begun = [StageBegan(r.batch.stage, r.step, r.batch.sequence_length) for r in stages_begun(self.progress, fresh)]
        self.recording = progress.watermark
        _, *written = yield from self._append([StepsCommitted(tuple(fresh)), *begun], stored=True)
        self.progress = progress
        return fresh, written

    def prepared(self, data: PreparedData) -> StorageTask[None]:
        yield from self._append([DataPrepared(data)])
        self.data = data

    def note(self, event: Event, stored: bool = False) -> StorageTask[JournalEntry]:
        """Journal an event that no decision made. `stored`: what follows waits until run storage has it."""
        (entry,) = yield from self._append([event], stored)
        return entry

    def conclude(self, status_text: str) -> StorageTask[None]:
        """Write the run's final status. Nothing is kept elsewhere any more."""
        yield from self._writing(partial(self._conclude, status_text))
        self._journal.discard_kept()

    def _conclude(self, status_text: str) -> None:
        self._reserve.give_up()
        self._objects.create(status_key(self.term), status_text.encode())

    def _append(self, events: Sequence[Event], stored: bool = False) -> StorageTask[list[JournalEntry]]:
        if not events:
            return []
        plain = [plain_of(event) for event in events]
        if self.writer is None:
            written = yield from self._writing(partial(self._in_reserve, partial(self._journal.append, plain)))
        else:
            proposed = self._journal.propose(plain)
            yield self.writer.add(proposed, stored)
            written = list(proposed.events)
        stamps = ((plain["seq"], plain["term"], plain["time"]) for plain in written)
        entries = [JournalEntry(*stamp, event) for stamp, event in zip(stamps, events, strict=True)]
        for entry in entries:
            self._enter(entry)
        return entries

    @property
    def is_stored(self) -> bool:
        """Whether run storage has all entries of this run so far."""
        return self._journal.stored == self._journal.last

    def store(self, entry: ChainEntry) -> None:
        """Store an entry that a change has given to the `writer`. Raises OSError, TermSuperseded."""
        self._noted(partial(self._in_reserve, partial(self._journal.store, entry)))

    def keep(self, entry: ChainEntry) -> None:
        """Keep it in the cluster, where storage hasn't taken it yet. Raises OSError, TermSuperseded."""
        self._journal.keep(entry)

    def unkeep(self, entry: ChainEntry) -> None:
        """Delete it there, once it is stored. Raises OSError."""
        self._journal.unkeep(entry)

    def _in_reserve(self, write: Callable[[], T]) -> T:
        """The result of `write`; on a full file system, in the space that was kept for the journal."""
        try:
            written = write()
        except OSError as error:
            if error.errno not in FULL or not self._reserve.give_up():
                raise
            log.warning("run storage %s is full: the journal continues in the space reserved for it", self._run_dir)
            written = write()
        self._reserve.tend()
        return written

    def _writing(self, write: Callable[[], T]) -> StorageTask[T]:
        try:
            written: T = yield partial(self._noted, write)
        except OSError as error:
            raise storage_error(error, self._run_dir) from error
        return written

    def _noted(self, write: Callable[[], T]) -> T:
        """The result of `write`; `trouble` is then up to date."""
        try:
            written = write()
        except OSError as error:
            if self.trouble is None:
                log.error("run storage %s can't be written: %s", self._run_dir, error)
            self.trouble = refusal("run storage can't be written", error)
            raise
        if self.trouble is not None:
            log.info("run storage %s can be written again", self._run_dir)
        self.trouble = None
        return written


def open_journal(
    run_dir: Location,
    holder: Holder = NO_HOLDER,
    caller: Caller = call_here,
    kept: Objects | None = None,
    followed: int | None = None,
    objects: SignedObjects | None = None,
) -> Journal:
    """Take the next term of a run; on a full file system, in the space that was kept for its journal.

    Args:
        holder: who takes it.
        caller: makes the calls to run storage.
        kept: where entries are kept that storage doesn't take; None: nowhere.
        followed: the newest term of another cluster's controller that it may follow; None: any.
        objects: the run's records, in run storage; None for those at its location.

    Raises:
        TermSuperseded: another cluster has taken a later one.
    """
    objects = objects or run_objects(run_dir, caller)
    try:
        return Journal(objects, holder, kept, followed)
    except OSError as error:
        if error.errno not in FULL or not _reserve_at(run_dir, caller).give_up():
            raise
        return Journal(objects, holder, kept, followed)


def _reserve_at(run_dir: Location, caller: Caller) -> Reserve:
    return SpaceReserve(run_dir, caller) if isinstance(run_dir, Path) else NoReserve()


def retry_until_written(write: Callable[[], T]) -> T:
    """The result of `write`, retried until storage works: for writes without which the run can't continue. A journal
    that seems damaged is read a few times: a bit may flip on its way here. Raises JournalCorrupt if it still does."""
    refused, num_damaged = "", 0
    while True:
        try:
            return write()
        except JournalCorrupt as error:
            num_damaged += 1
            if num_damaged == MOST_READS:
                raise
            log.error("read again: %s", error)
            time.sleep(WRITE_AGAIN_S)
        except (StorageError, OSError) as error:
            if str(error) != refused:
                log.error("tried again until it succeeds: %s", error)
            refused = str(error)
            time.sleep(WRITE_AGAIN_S)


def storage_error(error: OSError, location: Location) -> StorageError:
    """The error shown to users for a failed write to run storage."""
    return StorageError(
        f"run storage can't be written: {error.strerror or error}: {error.filename or location}",
        remedy="Make it writable and make room, or name another storage in the job file.",
        unchanged="Nothing was written.",
    )
