"""Threads that record the entries of a run's journal, so that decisions don't wait for run storage.

One stores entries in the order in which they were made, and tries again what storage refuses. Another keeps in the
cluster those that storage doesn't take in time, from where a successor of this controller stores them: an entry that is
kept counts as recorded, as the workers that a decision concerns don't outlive the cluster either.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.errors import TermSuperseded
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.storage.chain import ChainEntry
from orchestrator.storage.condition import StorageTrouble, unanswered
from orchestrator.storage.tasks import SLOW_S, Wait

log = logging.getLogger("orchestrator.control")

KEEP_AFTER_S = 0.5  # a request should be answered within 2 s
AGAIN_S = 1.0  # until what was refused is tried again


class JournalWriter:
    """Records the entries of one run. Methods may be called from any thread.

    Args:
        inbox: gets an `Arrival` without news at every progress.
    """

    def __init__(self, run: JournaledRun, inbox: Inbox) -> None:
        self._run, self._inbox = run, inbox
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, ChainEntry]] = deque()  # with the time when it was added, oldest first
        self._stored = self._kept = -1  # numbers of the newest entries
        self._to_store: SimpleQueue[ChainEntry] = SimpleQueue()
        self._error: Exception | None = None  # nothing is recorded any more
        for name, work in (("journal", self._store_all), ("journal-keeper", self._keep_late)):
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True).start()

    def add(self, entry: ChainEntry, stored: bool) -> Wait:
        """Record an entry, after those added before. Returns the wait for that; `stored`: until run storage has it.
        It raises TermSuperseded."""
        with self._changed:
            self._waiting.append((time.monotonic(), entry))
            self._changed.notify_all()
        self._to_store.put(entry)
        return self._wait_for(entry.number, stored)

    def finish(self) -> None:
        """Return once all entries are in run storage. Raises TermSuperseded."""
        with self._changed:
            newest = self._waiting[-1][1].number if self._waiting else -1
        self._wait_for(newest, stored=True)()

    @property
    def unrecorded_s(self) -> float:
        """How long the oldest entry that isn't recorded has been waiting; 0 without one."""
        with self._changed:
            added_s = next((added_s for added_s, entry in self._waiting if entry.number > self._kept), None)
            return 0.0 if added_s is None else time.monotonic() - added_s

    def trouble(self) -> StorageTrouble | None:
        """That of storage that has not taken the oldest entry for long."""
        with self._changed:
            open_s = time.monotonic() - self._waiting[0][0] if self._waiting else 0.0
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

    def _keep_late(self) -> None:
        while True:
            entry = self._next_late()
            try:
                self._run.keep(entry)
            except OSError as error:
                log.warning("a journal entry that storage doesn't take can't be kept in the cluster: %s", error)
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

    def _next_late(self) -> ChainEntry:
        """The oldest entry that isn't recorded, once the oldest one that isn't stored has waited for long."""
        with self._changed:
            while True:
                now_s = time.monotonic()
                late_s = self._waiting[0][0] + KEEP_AFTER_S if self._waiting else None
                entry = next((entry for _, entry in self._waiting if entry.number > self._kept), None)
                if entry is not None and late_s is not None and late_s <= now_s:
                    return entry
                self._changed.wait(None if entry is None or late_s is None else late_s - now_s)
