"""Journals as long runs leave them: an entry for each step, and one for a rescale from time to time."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.policy.state.run_state import StateDecided
from orchestrator.protocol.events.base import Event, plain_of
from orchestrator.protocol.events.generations import Rescaled
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.run_records.run_history import RunHistory
from orchestrator.storage.compaction import LIMITS as COMPACTION
from orchestrator.storage.compaction import compact, merge_histories
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from orchestrator.storage.tasks import StorageTask
from tests.unit.policy.imagined import Life, limits_of, record

LIMITS = limits_of(steps=10**9)
RESCALE_EVERY = 200  # entries


class UnflushedObjects(DirectoryObjects):
    """A directory whose objects are not flushed to the device: to make a long journal quickly. One writer."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._folder = root

    def create(self, key: str, data: bytes) -> bytes:
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
        return data


@dataclass
class JournalMaker:
    """Appends events to a run's journal, and compacts it when that is due.

    Args:
        is_compacted: False leaves all entries as they are.
        compaction_s: of each compaction, the duration of all its storage calls, and of the longest one.
    """

    run_dir: Path
    is_compacted: bool
    compaction_s: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        life = Life(LIMITS)
        life.run_until(lambda: life.step == 3)
        self._state = life.state
        self._objects = UnflushedObjects(self.run_dir)
        self._journal = Journal(self._objects)
        self._compacted, self._compacted_bytes = -1, 0
        self._step = 0

    def grow(self, num_events: int) -> None:
        """Append until there are so many events."""
        while self._journal.last.next_seq < num_events:
            self._journal.append([plain_of(event) for event in self._events()])
            entries = self._journal.last.number - self._compacted
            num_bytes = self._journal.num_bytes - self._compacted_bytes
            if self.is_compacted and (entries >= COMPACTION.entries or num_bytes >= COMPACTION.num_bytes):
                self._compacted_bytes = self._journal.num_bytes
                self._compact()

    def _events(self) -> Iterable[Event]:
        step, self._step = self._step, self._step + 1
        yield StepsCommitted((_record_of(step),))
        if step % RESCALE_EVERY == 0:
            yield Rescaled(step, 2, 3, step=step, why="asked for", moved_bytes=12_345_678, stall_s=0.31)
            yield StateDecided(replace(self._state, seq=step))

    def _compact(self) -> None:
        spent_s = [*_timed(compact(self._objects, self._journal.last, self._fold, COMPACTION))]
        spent_s += _timed(merge_histories(self._objects, COMPACTION))
        self._compacted = self._journal.last.number
        self.compaction_s.append((sum(spent_s), max(spent_s)))

    def _fold(self, stored: bytes | None) -> RunHistory:
        fold = RunHistory(self.run_dir, LIMITS, is_read=False)
        if stored is not None:
            fold.restore(stored)
        return fold


def _timed(task: StorageTask[object]) -> list[float]:
    """Durations of a task's storage calls."""
    spent_s: list[float] = []
    result: object = None
    try:
        while True:
            call: Callable[[], object] = task.send(result)
            began_s = time.perf_counter()
            result = call()
            spent_s.append(time.perf_counter() - began_s)
    except StopIteration:
        return spent_s


def _record_of(step: int) -> StepRecord:
    """A record as two workers of a model with experts make it, with a validation every 100 steps."""
    kinds = (TrafficKind.GRADIENT, TrafficKind.DISPATCH, TrafficKind.COMBINE, TrafficKind.PROTECTION)
    return record(
        step,
        vote_time=1.7e9 + 0.73 * step,
        step_s=0.73123456,
        validation_loss=3.0 + 1 / (step + 1) if step % 100 == 0 else None,
        lr=3e-4 / (1 + step / 10**6),
        grad_norm=1.0 + 1 / (step + 7),
        traffic={kind.value: Traffic(1_234_567 + step % 977, 0, 1_234_567) for kind in kinds},
        experts=ExpertLoad(0.2 + 1 / (step + 3), 0.31, step % 7, 0.83, 0.0, 0.97, 0.01),
        data_wait_s=0.00123,
        protection_wait_s=0.0456 + 1e-6 * (step % 89),
        communication_wait_s=0.0789,
        slowest=step % 2,
        slowness=1.0312,
        snapshot_interval=1,
    )
