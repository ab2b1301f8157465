"""Which generation the training thread may be waiting for peers in, and how it is freed when that is over."""

import logging
import threading
from collections.abc import Callable, Sequence

log = logging.getLogger("orchestrator.worker")


class AbortHandle:
    """Said by the training thread, ended by the control thread.

    Args:
        frees: each ends one kind of wait for peers.
    """

    def __init__(self, frees: Sequence[Callable[[], object]]) -> None:
        self._frees = frees
        self._lock = threading.Lock()
        self._engaged: int | None = None
        self._aborted = -1

    def begin(self, generation: int) -> None:
        """From now on this thread may wait for peers of `generation`."""
        with self._lock:
            self._engaged = generation

    def end(self) -> None:
        """It waits for none."""
        with self._lock:
            self._engaged = None

    def abort(self, generation: int) -> None:
        """Generations up to this one are over: whoever waits in one is freed, once."""
        with self._lock:
            engaged = self._engaged is not None and self._engaged <= generation
            is_new = generation > self._aborted
            self._aborted = max(self._aborted, generation)
        if not (engaged and is_new):
            return
        for free in self._frees:
            free()
        log.info("generation %d is aborted", generation)
