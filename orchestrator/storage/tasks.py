"""Storage tasks: code that needs storage, written in order, whose calls another thread can make.

A task is a generator. It yields each call to storage that it needs, and gets the call's result back:

    def note(self, event: Event) -> StorageTask[Entry]:
        entry = yield partial(self._journal.append, [event])
        self.show(entry)
        return entry

Whoever runs a task decides in which thread its calls are made: `run_inline` in the same one. An error of a call is
raised where the task yielded it.
"""

from collections.abc import Callable, Generator
from typing import Any, TypeVar

R = TypeVar("R")

StorageCall = Callable[[], Any]
StorageTask = Generator[StorageCall, Any, R]


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
