"""What a run remembers: all that a controller needs to go on from run storage, whoever it was before.

`RunHistory` is what follows from the journal, `JournaledRun` that and the right to write on. Besides what users see
(`Note`s of `policy`), the journal holds

    steps     {"records": [...]}      finished steps, once each: the account that `audit` balances
    state     {"state": {...}}        the decisions so far; the newest counts
    prepared  {"data": {...}}         the token store
    energy    {"workers": {...}}      what each worker has used since its beginning
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.errors import NotFound, StorageError
from orchestrator.policy.health.expert_collapse import ENDS, Trouble
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, absorb, stages_begun
from orchestrator.policy.state.run_state import Note, RunState
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import StepRecord
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.data_preparation import PreparedData
from orchestrator.storage.journal import Journal, read_events, write_atomically

log = logging.getLogger("orchestrator.control")

INTERNAL = ("state", "steps", "prepared", "energy")  # events that users don't read as events
STATUS_FILE = "status.json"
WRITE_AGAIN_S = 1.0

T = TypeVar("T")


class RunHistory:
    """The run's state and progress as its journal tells them. Needs no cluster, writes nothing."""

    def __init__(self, run_dir: Path, limits: RunLimits) -> None:
        self._run_dir = run_dir
        self.state = first_state(limits)
        self.progress = Progress()
        self.data: PreparedData | None = None
        self.times: dict[str, float] = {}  # of the first event of each kind
        self.newest_times: dict[str, float] = {}  # of the newest one
        self.counts: Counter[str] = Counter()  # of events, by kind
        self.numerics: dict[str, Any] | None = None  # of its first worker, where the run is exact
        self.differing: dict[str, Any] = {}  # by worker, how its numerics are others
        self.first_steps: dict[str, int] = {}  # by worker, the first that it may have trained of the steps that count
        self.saturated: set[tuple[str, int]] = set()  # worker and step, as they were told
        # Troubles of its experts that go on: by kind, the event with which each began.
        self.troubles: dict[str, Mapping[str, Any]] = {}
        self.resumed_by = ""  # token of the newest order to go on
        for event in read_events(run_dir):
            self._recall(event)

    def _recall(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        self._date(event)
        if kind == "state":
            self._become(from_plain(RunState, event["state"]))
        elif kind == "prepared":
            self.data = from_plain(PreparedData, event["data"])
        elif kind == "steps":
            self.progress = absorb(self.progress, _records_of(event))
        elif kind == "numerics":
            self.numerics = event["fingerprint"]
        elif kind == "numerics_differ":
            self.differing[event["worker"]] = event["differs"]
        elif kind == "gradient_saturated":
            self.saturated.add((event["worker"], event["step"]))
        elif kind == "resumed":
            self._go_back(event)
        else:
            self.hear_of_experts(event)

    def hear_of_experts(self, event: Mapping[str, Any]) -> None:
        """Keep an event with which a trouble of the experts begins; forget one that is over."""
        for trouble in Trouble:
            if event["kind"] == trouble:
                self.troubles[trouble] = event
            elif event["kind"] == ENDS[trouble]:
                self.troubles.pop(trouble, None)

    def _become(self, state: RunState) -> None:
        self.state = state
        for worker in state.members:
            self.first_steps.setdefault(worker, self.progress.watermark + 1)

    def _date(self, event: Mapping[str, Any]) -> None:
        self.times.setdefault(event["kind"], event["time"])
        self.newest_times[event["kind"]] = event["time"]
        self.counts[event["kind"]] += 1

    def _go_back(self, event: Mapping[str, Any]) -> None:
        """The run went on from a checkpoint: what came after it is done again."""
        self.resumed_by = event["token"]
        self.times.pop("ended", None)
        before = takewhile(lambda e: e["seq"] <= event["seq"], read_events(self._run_dir))
        self.progress = absorb(Progress(), committed_steps(before))
        self.first_steps = {w: step for w, step in self.first_steps.items() if step <= self.progress.watermark}
        watermark = self.progress.watermark
        self.troubles = {kind: event for kind, event in self.troubles.items() if event["step"] <= watermark}


class JournaledRun(RunHistory):
    """The run's state and progress, each change written down before anybody acts on it.

    What can't be written raises StorageError and changes nothing, so it can be tried again; `trouble` says so until
    something is written.

    Args:
        run_dir: the run's directory in run storage.
        term: the controller's.
    """

    def __init__(self, run_dir: Path, term: int, limits: RunLimits) -> None:
        self.trouble: str | None = None
        self._journal = Journal(run_dir, term)
        super().__init__(run_dir, limits)

    def decided(self, state: RunState, notes: Sequence[Note]) -> list[dict[str, Any]]:
        """Write down a decision with what it means for users. Returns the notes as events."""
        events: list[dict[str, Any]] = [{"kind": note.kind, **note.fields} for note in notes]
        changed = [{"kind": "state", "state": to_plain(state)}] if state != self.state else []
        written = self._append(events + changed)
        self._become(state)
        for event in written:
            if event["kind"] == "resumed":
                self._go_back(event)
        return written[: len(events)]

    def absorb(self, records: Sequence[StepRecord], up_to: int) -> tuple[list[StepRecord], list[dict[str, Any]]]:
        """Write down steps that are new and no later than `up_to`, and the stages that begin with them. Returns the
        steps and, as events, the stages."""
        records = [record for record in records if record.step <= up_to]
        progress = absorb(self.progress, records)
        fresh = [record for record in records if record.step > self.progress.watermark]
        if not fresh:
            return [], []
        begun = [
            {"kind": "stage_began", "stage": r.stage, "step": r.step, "sequence_length": r.sequence_length}
            for r in stages_begun(self.progress, fresh)
        ]
        _, *events = self._append([{"kind": "steps", "records": [to_plain(record) for record in fresh]}, *begun])
        self.progress = progress
        return fresh, events

    def prepared(self, data: PreparedData) -> None:
        self._append([{"kind": "prepared", "data": to_plain(data)}])
        self.data = data

    def note(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write down something that no decision made. Returns it as an event."""
        (event,) = self._append([{"kind": kind, **fields}])
        return event

    def conclude(self, status_text: str) -> None:
        """Leave the status with which the run has ended."""
        with self._writing():
            write_atomically(self._run_dir / STATUS_FILE, status_text)

    def _append(self, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not events:
            return []
        with self._writing():
            written = self._journal.append(events)
        for event in written:
            self._date(event)
        return written

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


def retry_until_written(write: Callable[[], T]) -> T:
    """What `write` returns, tried again until run storage lets it: for what nothing can go on without."""
    while True:
        try:
            return write()
        except (StorageError, OSError):
            time.sleep(WRITE_AGAIN_S)


def storage_error(error: OSError, directory: Path) -> StorageError:
    """What a failed write to run storage means to a user."""
    return StorageError(
        f"run storage can't be written: {error.strerror or error}: {error.filename or directory}",
        remedy="Make it writable and make room, or name another storage in the job file.",
        unchanged="Nothing was written.",
    )


def read_steps(run_dir: Path) -> list[StepRecord]:
    """Every step that the run has committed, in order. Needs no cluster."""
    return committed_steps(read_events(run_dir))


def committed_steps(events: Iterable[Mapping[str, Any]]) -> list[StepRecord]:
    """The steps of a journal, once each: those after a checkpoint from which the run went on don't count."""
    steps: list[StepRecord] = []
    for event in events:
        if event["kind"] == "steps":
            steps += _records_of(event)
        elif event["kind"] == "resumed":
            steps = [record for record in steps if record.step <= event["step"]]
    return steps


def _records_of(event: Mapping[str, Any]) -> list[StepRecord]:
    return [from_plain(StepRecord, plain) for plain in event["records"]]


def user_events(run_dir: Path, after: int = -1) -> list[dict[str, Any]]:
    """What happened to the run, without the controller's own bookkeeping. Needs no cluster."""
    return [event for event in read_events(run_dir, after) if event["kind"] not in INTERNAL]


def read_status(run_dir: Path) -> RunStatus:
    """The status with which the run ended. Raises NotFound if it hasn't."""
    try:
        return from_plain(RunStatus, json.loads((run_dir / STATUS_FILE).read_text()))
    except FileNotFoundError:
        raise NotFound(f"{run_dir} holds no {STATUS_FILE}: no run has ended there") from None
