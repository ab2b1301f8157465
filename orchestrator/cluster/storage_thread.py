"""Thread that makes the storage calls of a controller, so that the loop that keeps workers alive makes none.

Tasks (`orchestrator.storage.tasks`) run one after the other. All of a task but its storage calls runs in the loop's
thread; while one of its calls is open, no other task runs, so nothing else changes the run meanwhile. A call that hangs
delays the tasks behind it, and nothing else.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from orchestrator.cluster.inbox import Arrival, Inbox
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.condition import StorageTrouble, unanswered
from orchestrator.storage.tasks import StorageCall, StorageTask, slow_after_s


class StorageThread:
    """Runs the storage tasks of one run. Methods belong to the loop's thread, unless noted otherwise.

    Args:
        inbox: gets an `Arrival` without news whenever `advance` can go on.
        caller: makes the calls for those that have no access to it otherwise.
    """

    def __init__(self, inbox: Inbox, caller: Caller = call_here) -> None:
        self._inbox, self.caller = inbox, caller
        self._waiting: dict[str, Callable[[], StorageTask[None]]] = {}
        self._task: StorageTask[None] | None = None
        self._name = ""  # of the current task
        self._open: Future[Any] | None = None
        self._since_s = 0.0  # when the open call was made
        self._patience_s = 0.0  # with it, until it counts as trouble
        self._calls: SimpleQueue[tuple[StorageCall, Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, name="storage", daemon=True).start()

    def add(self, name: str, make: Callable[[], StorageTask[None]]) -> None:
        """Run the task that `make` returns, after those that wait. One that waits under this name is replaced."""
        self._waiting[name] = make

    def is_pending(self, name: str) -> bool:
        """Whether a task of this name waits or runs."""
        return name in self._waiting or (self._task is not None and self._name == name)

    def advance(self) -> None:
        """Run tasks until one waits for storage, or all are done. Raises what a task raises, which ends that task."""
        while self._open is None or self._open.done():
            if self._open is not None:
                self._continue(self._open)
            elif self._waiting:
                self._begin(next(iter(self._waiting)))
            else:
                return

    def finish(self) -> None:
        """Run all tasks to their end, waiting for storage. Raises as `advance`, which leaves later tasks waiting."""
        self.advance()
        while self._open is not None:
            self._wait(self._open)
            self.advance()

    def abandon(self) -> None:
        """Run the current task to its end, whatever it raises, and drop those that wait: no call is made afterwards."""
        self._waiting.clear()
        with suppress(Exception):
            self.finish()
        self._waiting.clear()

    @property
    def open_s(self) -> float:
        """How long the current call has been open; 0 if there is none. May be read from any thread."""
        is_open = self._open is not None  # before the time that belongs to it
        return time.monotonic() - self._since_s if is_open else 0.0

    def trouble(self) -> StorageTrouble | None:
        """That of a call that has been open for long. May be called from any thread."""
        patience_s, open_s = self._patience_s, self.open_s
        return unanswered(open_s, patience_s) if open_s > 0.0 and open_s >= patience_s else None

    def _begin(self, name: str) -> None:
        self._name, self._task = name, self._waiting.pop(name)()
        self._run(lambda task: next(task))

    def _continue(self, done: "Future[Any]") -> None:
        self._open = None
        error = done.exception()
        self._run(lambda task: task.send(done.result()) if error is None else task.throw(error))

    def _run(self, resume: Callable[[StorageTask[None]], StorageCall]) -> None:
        """Run the current task up to its next call, or its end."""
        assert self._task is not None, "no task is running"
        try:
            call = resume(self._task)
        except BaseException as error:
            self._task = None
            if not isinstance(error, StopIteration):
                raise
        else:
            self._patience_s, self._since_s, self._open = slow_after_s(call), time.monotonic(), Future()
            self._calls.put((call, self._open))

    def _wait(self, call: "Future[Any]") -> None:
        call.exception()  # its result is the task's

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
