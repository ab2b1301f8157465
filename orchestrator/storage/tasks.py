"""Storage tasks: code that needs storage, written in order, whose calls another thread can make.

A task is a generator. It yields each call to storage that it needs, and gets the call's result back:

    def note(self, event: Event) -> StorageTask[Entry]:
        entry = yield partial(self._journal.append, [event])
        self.show(entry)
        return entry

The runner of a task decides in which thread its calls are made: `run_inline` in the same one. An error of a call is
raised where the task yielded it. A task may also yield a `Wait`, for what other threads bring about.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

R = TypeVar("R")

SLOW_S, LENGTHY_S = 5.0, 120.0  # a call that takes longer is a sign of trouble

StorageCall = Callable[[], Any]
StorageTask = Generator[StorageCall, Any, R]


class Lengthy(Generic[R]):
    """A call that may take long though storage is well: it reads or deletes much."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._call = call

    def __call__(self) -> R:
        return self._call()


@dataclass(frozen=True)
class Wait:
    """What a task waits for, and no call of its own brings about. Calling it waits in this thread.

    Args:
        is_over: whether it has come about; raises what ends the run.
        wait: returns once it has.
    """

    is_over: Callable[[], bool]
    wait: Callable[[], object]

    def __call__(self) -> None:
        self.wait()


def slow_after_s(call: StorageCall) -> float:
    """Duration from which on a call is a sign of trouble."""
    return LENGTHY_S if isinstance(call, Lengthy) else SLOW_S


def run_inline(task: StorageTask[R]) -> R:
    """The result of a task, its calls made in this thread. Raises what the task raises."""
    try:
        call = next(task)
        while True:
            try:
                result = call()
            except Exception as error:
                call = task.throw(error)
            else:
                call = task.send(result)
    except StopIteration as ended:
        value: R = ended.value
        return value
