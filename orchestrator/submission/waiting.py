"""Wait for room in the cluster, for a run that is not to be queued."""

import time
from collections.abc import Callable

from orchestrator.errors import JobDoesNotFit

RETRY_EVERY_S = 1.0


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
                on_wait = None
        time.sleep(RETRY_EVERY_S)
