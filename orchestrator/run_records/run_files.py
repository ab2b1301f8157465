"""Records of a run in run storage, read without a cluster: status, events, sample ledger, log lines."""

import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import NotFound, UsageError, nearest
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.events.base import Event, JournalEntry
from orchestrator.protocol.status import RunStatus
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecord, CheckpointRecords
from orchestrator.run_records.checkpoints.search import choose, list_checkpoints
from orchestrator.run_records.final_status import has_ended, read_status
from orchestrator.run_records.job_files import has_job, read_job
from orchestrator.run_records.run_history import RunHistory, read_code, read_entries, read_steps, user_events
from orchestrator.run_records.run_logs import LogLine, log_reader
from orchestrator.run_records.status import status_from_journal
from orchestrator.sampling.sample_ledger import AuditResult, audit
from orchestrator.spec.job import RUN_NAME, JobSpec
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.backends.probe import reading
from orchestrator.storage.backends.signed_objects import SigningKey
from orchestrator.storage.backends.signing_keys import run_objects
from orchestrator.storage.chain_reader import has_journal
from orchestrator.storage.journal_age import journal_age_s

LOOK_EVERY_S = 1.0
NAMED_AT_MOST = 5  # runs in a message
T = TypeVar("T")


class RunFiles:
    """A run by its directory in run storage.

    Args:
        key: with which its records are signed; None for the one that this process knows, if any.

    Raises:
        NotFound: the directory holds no run.
        StorageError, NotAllowed: run storage can't be read. The methods raise both too.
        JournalCorrupt: records are damaged. The methods raise it too.
    """

    def __init__(self, run_dir: Location, key: SigningKey | None = None) -> None:
        with reading(run_dir):
            if not holds_run(run_dir):
                offer = nearest(run_dir.name, runs_in(run_dir.parent))
                remedy = f"{offer}Name the run storage that the job file names: --storage DIR|URL."
                raise NotFound(f"{run_dir} holds no run", remedy=remedy)
        self.run_dir, self._key = run_dir, key

    @property
    def directory(self) -> Path:
        """The run's directory. Raises UsageError if the run is in a bucket."""
        if isinstance(self.run_dir, Path):
            return self.run_dir
        raise UsageError(
            f"{self.run_dir} is in a bucket, and this is read from a directory",
            remedy="Copy the run to a directory, and name that: --storage DIR.",
            unchanged="Nothing was started.",
        )

    def job(self) -> JobSpec:
        """The run's job, with every path absolute, and the code that it uses now."""
        with reading(self.run_dir):
            job = read_job(self.run_dir)
            return job.model_copy(update={"code": read_code(self.run_dir, job)})

    def status(self) -> RunStatus:
        """The run's final status; until it has ended, the status from its journal."""
        with reading(self.run_dir):
            try:
                return read_status(self.run_dir, self._key)
            except NotFound:
                return status_from_journal(self.run_dir)

    def has_ended(self) -> bool:
        """Whether the run has a final status, and was not resumed since."""
        with reading(self.run_dir):
            return has_ended(self.run_dir)

    def entries(
        self, only: Collection[type[Event]] = (), leave_out: Collection[type[Event]] = ()
    ) -> list[JournalEntry]:
        """Events of the run's journal, as `read_entries` chooses them."""
        with reading(self.run_dir):
            return read_entries(self.run_dir, only=only, leave_out=leave_out)

    def events(self, since_s: float = 0.0, tail: int | None = None) -> list[dict[str, Any]]:
        """Events since this `time.time()`; with `tail` only so many of the newest."""
        with reading(self.run_dir):
            found = user_events(self.run_dir)
        return _newest([event for event in found if event["time"] >= since_s], tail)

    def events_to_come(
        self,
        is_over: Callable[[], bool],
        since_s: float = 0.0,
        tail: int | None = None,
        look_every_s: float = LOOK_EVERY_S,
    ) -> Iterator[dict[str, Any]]:
        """Past events, as `events` returns them, and future ones, until `is_over` returns True."""
        after = -1
        while True:
            last_look = is_over()  # asked before reading: what is written before the end is read
            with reading(self.run_dir):
                found = user_events(self.run_dir, after)
            after = found[-1]["seq"] if found else after
            yield from _newest([event for event in found if event["time"] >= since_s], tail)
            tail = None
            if last_look:
                return
            time.sleep(look_every_s)

    def journal_age_s(self) -> float:
        """Seconds since the run's journal was written."""
        with reading(self.run_dir):
            return journal_age_s(objects_at(self.run_dir))

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """The complete checkpoints, oldest first."""
        records = self._checkpoint_records()
        with reading(self.run_dir):
            return list_checkpoints(self.run_dir, records)

    def named_checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """The same, and those that were removed by hand, in part or whole."""
        return self._checkpoint_records().current

    def choose_checkpoint(self, step: int | None = None) -> Location | None:
        """The checkpoint of `step`, or the newest, with verified digests. None without any. Raises as `choose`."""
        records = self._checkpoint_records()
        with reading(self.run_dir):
            return choose(self.run_dir, records, step)

    def _checkpoint_records(self) -> CheckpointRecords:
        with reading(self.run_dir):
            limits, records = RunLimits.of(self.run_dir.name, self.job()), run_objects(self.run_dir, key=self._key)
            history = RunHistory(self.run_dir, limits, objects=records)
            read_job(self.run_dir, history.job_sha256, records)
            return history.checkpoints

    def steps(self) -> list[StepRecord]:
        """Every committed step, in order."""
        with reading(self.run_dir):
            return read_steps(self.run_dir)

    def audit(self) -> AuditResult:
        """Whether every sample position of the committed steps was consumed exactly once, in order."""
        steps = self.steps()
        ranges = ((record.step, record.batch.first_position, record.batch.num_positions) for record in steps)
        return audit(ranges, (record.step for record in steps if record.update.skipped))

    def logs(
        self,
        is_over: Callable[[], bool] | None = None,
        source: str | None = None,
        tail: int | None = None,
        since_s: float = 0.0,
        look_every_s: float = LOOK_EVERY_S,
    ) -> Iterator[LogLine]:
        """Log lines of all processes, merged by time; with `is_over` also future ones, until it returns True.

        Future lines are in order within one poll.

        Args:
            source: only lines of this process: controller, tracker, a worker's id.
            tail: of the existing lines, only so many of the newest.
            since_s: only lines since this `time.time()`, to the second.

        Raises:
            NotFound: no process of that name has written a log.
        """
        reader = log_reader(self.run_dir)
        with reading(self.run_dir):
            found = reader.sources()
        if source is not None and source not in found:
            known = ", ".join(found) or "no process yet"
            raise NotFound(f"run {self.run_dir.name} has no log of {source!r}", remedy=f"It has logs of {known}.")
        since = datetime.fromtimestamp(since_s).strftime("%Y-%m-%d %H:%M:%S") if since_s > 0 else ""
        while True:
            last_look = is_over is None or is_over()  # asked before reading: what is written before the end is read
            with reading(self.run_dir):
                sources = reader.sources() if source is None else [source]
                lines = [line for each in sources for line in reader.read_on(each) if line.stamp >= since]
            yield from _newest(sorted(lines, key=lambda line: line.stamp), tail)
            tail = None
            if last_look:
                return
            time.sleep(look_every_s)


def run_dir_in(storage: Location, run_id: str) -> Location:
    """Location of a run of that name in run storage, existing or not. Raises NotFound for an invalid name, which might
    lead out of the storage."""
    if not RUN_NAME.fullmatch(run_id):
        raise NotFound(
            f"no run can be called {run_id!r}",
            remedy=f"{nearest(run_id, runs_in(storage))}A name is of a-z, 0-9 and -; directories go to --storage.",
        )
    return (storage.absolute() if isinstance(storage, Path) else storage) / run_id


def holds_run(run_dir: Location) -> bool:
    """Whether a run has been submitted to this location."""
    return has_journal(objects_at(run_dir)) or has_job(run_dir)


def runs_in(storage: Location) -> list[str]:
    """Names of the runs in run storage; none if there is no such directory."""
    names = objects_at(storage).names("")
    return [name for name in names if RUN_NAME.fullmatch(name) and holds_run(storage / name)]


def _newest(found: list[T], tail: int | None) -> list[T]:
    return found if tail is None else found[len(found) - min(tail, len(found)) :]
