"""Thread that makes the storage calls of a controller, so that the loop that keeps workers alive makes none.

Tasks (`orchestrator.storage.tasks`) are in lanes, and run one after the other there. A call that hangs delays the tasks
behind it in its lane, and the calls of others. All of a task but its calls and waits runs in the loop's thread.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from enum import Enum
from queue import SimpleQueue
from typing import Any

from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.condition import StorageTrouble, unanswered
from orchestrator.storage.tasks import StorageCall, StorageTask, Wait, slow_after_s

Calls = SimpleQueue[tuple[StorageCall, "Future[Any]"]]


class Lane(Enum):
    """What a task waits for, by which it doesn't delay tasks that wait for less."""

    DECISIONS = "decisions"  # for entries of the journal to be recorded
    RECORDS = "records"  # for them to be in run storage
    CALLS = "calls"  # for its own calls to storage


class StorageThread:
    """Runs the storage tasks of one run. Methods belong to the loop's thread, unless noted otherwise.

    Args:
        inbox: gets an `Arrival` without news whenever `advance` can go on because a call has returned.
        caller: makes the calls for those that have no access to it otherwise.
    """

    def __init__(self, inbox: Inbox, caller: Caller = call_here) -> None:
        self._inbox, self.caller = inbox, caller
        self._calls: Calls = SimpleQueue()
        self._lanes = {lane: _Tasks(self._calls) for lane in Lane}  # decisions come first
        threading.Thread(target=self._serve, name="storage", daemon=True).start()

    def add(self, name: str, make: Callable[[], StorageTask[None]], lane: Lane = Lane.CALLS) -> None:
        """Run the task that `make` returns, after those of its lane. One that waits there under this name is
        replaced."""
        self._lanes[lane].add(name, make)

    def is_pending(self, name: str) -> bool:
        """Whether a task of this name waits or runs."""
        return any(tasks.has(name) for tasks in self._lanes.values())

    def advance(self) -> None:
        """Run tasks until all wait, or are done. Raises what a task raises, which ends that task."""
        has_run = True
        while has_run:  # a task may add one to another lane
            has_run = False
            for tasks in self._lanes.values():
                has_run |= tasks.advance()

    def finish(self) -> None:
        """Run all tasks to their end, waiting for storage. Raises as `advance`, which leaves later tasks waiting."""
        self.advance()
        while busy := next((tasks for tasks in self._lanes.values() if tasks.is_busy), None):
            busy.wait()
            self.advance()

    def abandon(self) -> None:
        """Finish the current tasks, ignoring their errors, and drop those that wait. No call is made afterwards."""
        for tasks in self._lanes.values():
            tasks.drop()
        for _ in self._lanes:
            with suppress(Exception):
                self.finish()
        for tasks in self._lanes.values():
            tasks.drop()

    def trouble(self) -> StorageTrouble | None:
        """That of a call that has been open for long. May be called from any thread."""
        late = (tasks for tasks in self._lanes.values() if tasks.open_s > max(0.0, tasks.patience_s))
        return next((unanswered(tasks.open_s, tasks.patience_s) for tasks in late), None)

    def _serve(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            self._inbox.put(Arrival(lambda: None, is_news=False))


class _Tasks:
    """Tasks of one lane."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._next: dict[str, Callable[[], StorageTask[None]]] = {}
        self._task: StorageTask[None] | None = None
        self._name = ""  # of the current task
        self._open: Future[Any] | Wait | None = None
        self._since_s = 0.0  # when the current call was made
        self.patience_s = 0.0  # with it, until it counts as trouble

    def add(self, name: str, make: Callable[[], StorageTask[None]]) -> None:
        self._next[name] = make

    def drop(self) -> None:
        self._next.clear()

    def has(self, name: str) -> bool:
        return name in self._next or (self._task is not None and self._name == name)

    @property
    def is_busy(self) -> bool:
        return self._open is not None

    @property
    def open_s(self) -> float:
        since_s = self._since_s  # before the call that it belongs to may end
        return time.monotonic() - since_s if isinstance(self._open, Future) else 0.0

    def advance(self) -> bool:
        """Run tasks until one waits, or all are done. Returns whether any did something."""
        has_run = False
        while self._open is None or self._is_over(self._open):
            if self._open is None and not self._next:
                break
            has_run = True
            if self._open is not None:
                self._continue(self._open)
            else:
                self._name = next(iter(self._next))
                self._task = self._next.pop(self._name)()
                self._run(lambda task: next(task))
        return has_run

    def wait(self) -> None:
        """Wait until the open call has returned, or the open condition holds. Raises an error that ends the run."""
        if isinstance(self._open, Future):
            self._open.exception()  # its result is the task's
        elif self._open is not None:
            self._open()

    def _is_over(self, what: "Future[Any] | Wait") -> bool:
        return what.done() if isinstance(what, Future) else what.is_over()

    def _continue(self, what: "Future[Any] | Wait") -> None:
        self._open = None
        if isinstance(what, Wait):
            self._run(lambda task: next(task))
        elif (error := what.exception()) is not None:
            self._run(lambda task: task.throw(error))
        else:
            self._run(lambda task: task.send(what.result()))

    def _run(self, resume: Callable[[StorageTask[None]], StorageCall]) -> None:
        """Run the current task up to its next call or wait, or its end."""
        assert self._task is not None, "no task is running"
        try:
            call = resume(self._task)
        except BaseException as error:
            self._task = None
            if not isinstance(error, StopIteration):
                raise
            return
        if isinstance(call, Wait):
            self._open = call
        else:
            self.patience_s, self._since_s, self._open = slow_after_s(call), time.monotonic(), Future()
            self._calls.put((call, self._open))
