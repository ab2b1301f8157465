"""Compaction of a run's journal by its controller, while the run goes on.

Each storage call of a compaction is a task of its own (`storage.tasks`), so no decision waits for more than one.
"""

import logging
import time
from functools import partial
from typing import Any

from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.run_history import RunHistory
from orchestrator.storage.backends.location import Location
from orchestrator.storage.compaction import CompactionLimits, compact, merge_histories
from orchestrator.storage.journal import Journal
from orchestrator.storage.objects import Objects
from orchestrator.storage.reserve import FULL, Reserve
from orchestrator.storage.tasks import Lengthy, StorageCall, StorageTask

log = logging.getLogger("orchestrator.control")

COMPACT_AGAIN_S = 30.0  # after a failure, which leaves the journal as it was


class JournalCompactor:
    """Compacts the journal of one run.

    Args:
        objects: the run's, in run storage.
        compacted: number of the newest entry that a state includes; -1 for none.
    """

    def __init__(
        self,
        run_dir: Location,
        limits: RunLimits,
        journal: Journal,
        objects: Objects,
        reserve: Reserve,
        compacted: int,
        compaction: CompactionLimits,
    ) -> None:
        self._run_dir, self._run_limits, self._limits = run_dir, limits, compaction
        self._journal, self._objects, self._reserve = journal, objects, reserve
        self._compacted, self._compacted_bytes = compacted, 0
        self._task: StorageTask[Any] | None = None
        self._result: Any = None  # of its last call
        self._again_s = 0.0
        self._trouble = ""

    def is_due(self) -> bool:
        """Whether `advance` has something to do."""
        entries = self._journal.stored.number - self._compacted
        num_bytes = self._journal.num_bytes - self._compacted_bytes
        is_large = entries >= self._limits.entries or num_bytes >= self._limits.num_bytes
        return self._task is not None or (is_large and time.monotonic() >= self._again_s)

    def advance(self) -> StorageTask[None]:
        """Make the next storage call of a compaction."""
        if self._task is None:
            self._task, self._result = self._compact(), None
        try:
            call = self._task.send(self._result)
            self._result = yield Lengthy(partial(self._in_reserve, call))
        except StopIteration:
            self._task = None
        except Exception as error:  # it is no reason to end the run
            self._task, self._again_s = None, time.monotonic() + COMPACT_AGAIN_S
            if repr(error) != self._trouble:
                log.error("the journal of %s can't be compacted now: %r", self._run_dir, error)
            self._trouble = repr(error)

    def _compact(self) -> StorageTask[None]:
        own, num_bytes = self._journal.stored, self._journal.num_bytes
        compacted = yield from compact(self._objects, own, self._fold, self._limits)
        self._compacted = compacted
        if compacted == own.number:
            self._compacted_bytes = num_bytes
        self._trouble = ""
        log.info("the journal of %s is compacted up to entry %d", self._run_dir, compacted)
        yield from merge_histories(self._objects, self._limits)

    def _fold(self, stored: bytes | None) -> RunHistory:
        fold = RunHistory(self._run_dir, self._run_limits, is_read=False, objects=self._objects)
        if stored is not None:
            fold.restore(stored)
        return fold

    def _in_reserve(self, call: StorageCall) -> Any:
        """The call's result; on a full file system, in the space kept for the journal: compaction frees more."""
        try:
            return call()
        except OSError as error:
            if error.errno not in FULL or not self._reserve.give_up():
                raise
            return call()
