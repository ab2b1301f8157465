"""Inbox of an actor's loop: results of its calls to other actors, in the order in which they arrive."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import ray

R = TypeVar("R")


@dataclass(frozen=True)
class Arrival:
    """Something for the loop.

    Args:
        take: takes it in, in the loop's thread.
        is_news: a decision may depend on it.
    """

    take: Callable[[], None]
    is_news: bool = True


Inbox = SimpleQueue[Arrival]


def wake(inbox: Inbox) -> None:
    """Let the loop decide: something has changed that arrives in another way."""
    inbox.put(Arrival(lambda: None))


def post(inbox: Inbox, ref: "ray.ObjectRef[R]", take: Callable[["Future[R]"], None]) -> None:
    """Have the loop call `take` with the result of a Ray call, or its error, when it arrives."""
    future: Any = ref.future()
    future.add_done_callback(lambda done: inbox.put(Arrival(partial(take, done))))
