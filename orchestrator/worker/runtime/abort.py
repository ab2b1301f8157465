"""Handle that frees the training thread from waiting for peers once their generation is over."""

import logging
import threading
from collections.abc import Callable, Sequence

log = logging.getLogger("orchestrator.worker")


class AbortHandle:
    """Set by the training thread, triggered by the control thread.

    Args:
        frees: each ends one kind of wait for peers.
    """

    def __init__(self, frees: Sequence[Callable[[], object]]) -> None:
        self._frees = frees
        self._lock = threading.Lock()
        self._engaged: int | None = None
        self._aborted = -1

    def begin(self, generation: int) -> None:
        """Mark that this thread may wait for peers of `generation` from now on."""
        with self._lock:
            self._engaged = generation

    def end(self) -> None:
        """Mark that this thread waits for no peers."""
        with self._lock:
            self._engaged = None

    def abort(self, generation: int) -> None:
        """End generations up to this one and free the training thread if it waits in one, once."""
        with self._lock:
            engaged = self._engaged is not None and self._engaged <= generation
            is_new = generation > self._aborted
            self._aborted = max(self._aborted, generation)
        if not (engaged and is_new):
            return
        for free in self._frees:
            free()
        log.info("generation %d is aborted", generation)
