"""Calls to run storage with a limit of time, for a process that serves many runs: one storage that hangs must not hold
up requests to the others.

A thread in a call that hangs can't be ended. So each storage may have a few such threads, and calls to it fail at once
while it has.
"""

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import TypeVar

from orchestrator.errors import OrchestratorError, StorageError

R = TypeVar("R")

MOST_HUNG = 4  # calls to one storage


def refusal(storage: Hashable, error: OSError) -> OrchestratorError:
    """The error shown to users for storage that refuses a call."""
    return StorageError(
        f"run storage {storage} can't be read or written: {error.strerror or error}: {error.filename or storage}",
        remedy="Try again once it can; requests to active runs don't need it.",
    )


class StorageGuard:
    """Makes storage calls in threads of their own. Its methods may be called from any thread.

    Args:
        refusal: the error to raise for an OSError of a call to a storage.
    """

    def __init__(self, refusal: Callable[[Hashable, OSError], OrchestratorError] = refusal) -> None:
        self._refusal = refusal
        self._lock = threading.Lock()
        self._hung: Counter[Hashable] = Counter()  # calls that have exceeded the limit and not returned, by storage

    def call(
        self, storage: Hashable, patience_s: float, function: Callable[[], R], undo: Callable[[], None] | None = None
    ) -> R:
        """The result of `function`, which reads or writes in `storage`, within `patience_s`.

        Args:
            undo: called, in the function's thread, if the function succeeds too late.

        Raises:
            StorageError: it has not returned in time, and may still do its work, unless there is an `undo`; or
                earlier calls hang.
            Exception: whatever else it raises; for an OSError the `refusal`.
        """
        with self._lock:
            if self._hung[storage] >= MOST_HUNG:
                raise _hangs(storage, "earlier calls have not returned", unchanged="Nothing was read or written.")
        done: Future[R] = Future()
        thread = threading.Thread(target=self._serve, args=(storage, function, done), name="storage call", daemon=True)
        thread.start()
        try:
            return done.result(patience_s)
        except TimeoutError:
            if done.done():  # just now
                return done.result()
        self._count(storage, done, undo)
        raise _hangs(storage, f"no answer within {patience_s:g} s", unchanged="")

    def _count(self, storage: Hashable, done: "Future[R]", undo: Callable[[], None] | None) -> None:
        """Count a call as hung until it returns."""
        with self._lock:
            self._hung[storage] += 1

        def returned(late: "Future[R]") -> None:
            if undo is not None and late.exception() is None:
                undo()
            with self._lock:
                self._hung[storage] -= 1

        done.add_done_callback(returned)

    def _serve(self, storage: Hashable, function: Callable[[], R], done: "Future[R]") -> None:
        try:
            result = function()
        except OSError as error:
            refused = self._refusal(storage, error)
            refused.__cause__ = error
            done.set_exception(refused)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)


def _hangs(storage: Hashable, how: str, unchanged: str) -> StorageError:
    return StorageError(
        f"run storage {storage} hangs: {how}",
        remedy="Try again once it answers; requests to active runs don't need it.",
        unchanged=unchanged,
    )
