"""Threads that record the entries of a run's journal, so that decisions don't wait for run storage.

One stores entries in the order in which they were made, and tries again what storage refuses. Another keeps decisions
in the cluster meanwhile, from where a successor of this controller stores them: an entry that is kept counts as
recorded, as the workers that a decision concerns don't outlive the cluster either. A bucket, a busy disk or one that
hangs takes longer than that.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.errors import TermSuperseded
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.storage.chain import ChainEntry
from orchestrator.storage.condition import StorageTrouble, unanswered
from orchestrator.storage.tasks import SLOW_S, Wait

log = logging.getLogger("orchestrator.control")

AGAIN_S = 1.0  # until what was refused is tried again


@dataclass(frozen=True)
class _Waiting:
    """An entry that run storage doesn't have. `is_urgent`: it is a decision, for which being kept is enough."""

    entry: ChainEntry
    is_urgent: bool
    added_s: float


class JournalWriter:
    """Records the entries of one run. Methods may be called from any thread.

    Args:
        inbox: gets an `Arrival` without news at every progress.
    """

    def __init__(self, run: JournaledRun, inbox: Inbox) -> None:
        self._run, self._inbox = run, inbox
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()  # for run storage, oldest first
        self._stored = self._kept = -1  # numbers of the newest entries
        self._to_store: SimpleQueue[ChainEntry] = SimpleQueue()
        self._error: Exception | None = None  # once set, nothing more is recorded
        for name, work in (("journal", self._store_all), ("journal-keeper", self._keep_urgent)):
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True).start()

    def add(self, entry: ChainEntry, stored: bool) -> Wait:
        """Record an entry, after those added before. Returns the wait for that; `stored`: until run storage has it.
        It raises TermSuperseded."""
        with self._changed:
            self._waiting.append(_Waiting(entry, is_urgent=not stored, added_s=time.monotonic()))
            self._changed.notify_all()
        self._to_store.put(entry)
        return self._wait_for(entry.number, stored)

    def finish(self) -> None:
        """Return once all entries are in run storage. Raises TermSuperseded."""
        with self._changed:
            newest = self._waiting[-1].entry.number if self._waiting else -1
        self._wait_for(newest, stored=True)()

    @property
    def unrecorded_s(self) -> float:
        """How long the oldest decision that isn't recorded has been waiting; 0 without one."""
        with self._changed:
            added_s = next((one.added_s for one in self._unkept() if one.is_urgent), None)
            return 0.0 if added_s is None else time.monotonic() - added_s

    def trouble(self) -> StorageTrouble | None:
        """That of storage that has not taken the oldest entry for long."""
        with self._changed:
            open_s = time.monotonic() - self._waiting[0].added_s if self._waiting else 0.0
        return unanswered(open_s, SLOW_S) if open_s >= SLOW_S else None

    def _wait_for(self, number: int, stored: bool) -> Wait:
        def wait() -> None:
            with self._changed:
                self._changed.wait_for(partial(self._is_done, number, stored))

        return Wait(partial(self._is_done, number, stored), wait)

    def _is_done(self, number: int, stored: bool) -> bool:
        if self._error is not None:
            raise self._error
        return number <= (self._stored if stored else max(self._stored, self._kept))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._inbox.put(Arrival(lambda: None, is_news=False))

    def _store_all(self) -> None:
        while True:
            entry = self._to_store.get()
            while not self._has_stored(entry):
                time.sleep(AGAIN_S)
            with self._changed:
                self._waiting.popleft()
                self._stored, was_kept = entry.number, entry.number <= self._kept
                self._changed.notify_all()
            self._inbox.put(Arrival(lambda: None, is_news=False))
            if was_kept:
                self._unkeep(entry)

    def _has_stored(self, entry: ChainEntry) -> bool:
        try:
            self._run.store(entry)
        except OSError:
            return False
        return True

    def _unkeep(self, entry: ChainEntry) -> None:
        with suppress(OSError):  # it does no harm there
            self._run.unkeep(entry)

    def _keep_urgent(self) -> None:
        while True:
            entry = self._next_to_keep()
            try:
                self._run.keep(entry)
            except OSError as error:
                if not self._is_done(entry.number, stored=True):
                    log.warning("the cluster can't keep a journal entry that run storage hasn't taken: %s", error)
                time.sleep(AGAIN_S)
                continue
            except TermSuperseded:
                if not self._is_done(entry.number, stored=True):  # else it needed not be kept
                    raise
            with self._changed:
                self._kept, is_late = entry.number, entry.number <= self._stored
                self._changed.notify_all()
            self._inbox.put(Arrival(lambda: None, is_news=False))
            if is_late:
                self._unkeep(entry)

    def _next_to_keep(self) -> ChainEntry:
        """The oldest entry that isn't recorded, once a decision is among those: what it follows is kept first."""
        with self._changed:
            while True:
                unkept = self._unkept()
                if any(one.is_urgent for one in unkept):
                    return unkept[0].entry
                self._changed.wait()

    def _unkept(self) -> list[_Waiting]:
        return [one for one in self._waiting if one.entry.number > self._kept]
