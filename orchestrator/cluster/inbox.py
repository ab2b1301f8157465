"""Inbox of an actor's loop: results of its calls to other actors, in the order in which they arrive."""

from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


@dataclass(frozen=True)
class CallResult:
    """Result of a call: `of` is a worker id or another actor's name, `method` the called method."""

    of: str
    method: str
    future: "Future[Any]"


Inbox = SimpleQueue[CallResult | None]  # None: something else has changed


def post(inbox: Inbox, of: str, method: str, ref: Any) -> None:
    """Put the result of a Ray call into the inbox when it arrives."""
    ref.future().add_done_callback(lambda future: inbox.put(CallResult(of, method, future)))
