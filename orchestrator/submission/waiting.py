"""Waits of a client: for room in the cluster, for a run that is not to be queued, and for the end of a run."""

import time
from collections.abc import Callable

from orchestrator.errors import JobDoesNotFit, NotFinished
from orchestrator.protocol.status import RunStatus

WAITING = "Waiting for room"  # begins the message of a command
RETRY_EVERY_S = 1.0
LOOK_EVERY_S = 0.5


def when_there_is_room(
    start: Callable[..., str], timeout_s: float | None, on_wait: Callable[[JobDoesNotFit], None] | None
) -> str:
    """The result of `start`: at once without a `timeout_s`, as the run may then wait in the queue, else once there is
    room. Raises JobDoesNotFit."""
    if timeout_s is None:
        return start()
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return start(wait=False)
        except JobDoesNotFit as error:
            if time.monotonic() + RETRY_EVERY_S > deadline_s:
                raise
            if on_wait is not None:
                on_wait(error)
        time.sleep(RETRY_EVERY_S)


def until_ended(
    get: Callable[[], RunStatus],
    timeout_s: float | None,
    on_status: Callable[[RunStatus], None] | None,
    every_s: float = LOOK_EVERY_S,
) -> RunStatus:
    """The status of a run that has ended. Arguments and errors as of `OrchestratorClient.wait`.

    Args:
        get: gives the run's status; called every `every_s`.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        status = get()
        if on_status is not None:
            on_status(status)
        if status.phase.ended:
            return status
        left_s = every_s if deadline_s is None else deadline_s - time.monotonic()
        if left_s <= 0.0:
            raise NotFinished(f"run {status.run_id} is {status.phase} after {timeout_s:g} s of waiting: {status.why}")
        time.sleep(min(every_s, left_s))
