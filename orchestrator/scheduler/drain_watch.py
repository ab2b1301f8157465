"""Watch of draining nodes: drained by an operator, an autoscaler, or a cloud provider that reclaims them."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from orchestrator.cluster.nodes import draining_nodes

log = logging.getLogger("orchestrator.control")

LOOK_EVERY_S = 0.25  # a look costs Ray's head half a millisecond, so there is one watch per cluster


class DrainWatch:
    """Looks in its own thread, since Ray's head may be slow to answer.

    Args:
        changed: called when there are others than before.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self.nodes: Mapping[str, float] = {}  # with deadlines in `time.time()` seconds, 0 without one

    def start(self) -> None:
        threading.Thread(target=self._watch, name="drains", daemon=True).start()

    def _watch(self) -> None:
        has_failed = False
        while True:
            try:
                self._look()
                has_failed = False
            except Exception:  # Ray's head is unreachable, which is detected elsewhere too
                if not has_failed:
                    log.exception("draining nodes can't be read from Ray")
                has_failed = True
            time.sleep(LOOK_EVERY_S)

    def _look(self) -> None:
        nodes = draining_nodes()
        if nodes != self.nodes:
            self.nodes = nodes
            self._changed()
