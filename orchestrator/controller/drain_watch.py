"""Looks which nodes are being drained: by an operator, an autoscaler, or a cloud that wants them back."""

import logging
import threading
import time
from collections.abc import Mapping

import ray

from orchestrator.controller.worker_group import Inbox

log = logging.getLogger("orchestrator.control")

EVERY_S = 0.25  # a look takes Ray's head half a millisecond


def draining_nodes() -> dict[str, float]:
    """Ids of nodes that live and are drained, with `time.time()` of their deadlines; 0 for none."""
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return {node: deadline_ms / 1000.0 for node, deadline_ms in nodes.items()}


class DrainWatch:
    """In a thread of its own, since Ray's head may be slow to answer. Its news come into the inbox as None."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._nodes: dict[str, float] = {}

    @property
    def nodes(self) -> Mapping[str, float]:
        """All nodes that were seen to be drained: it can't be taken back, and a node that is gone is none any more."""
        return self._nodes

    def start(self) -> None:
        threading.Thread(target=self._watch, name="drains", daemon=True).start()

    def _watch(self) -> None:
        has_failed = False
        while True:
            time.sleep(EVERY_S)
            try:
                known = {**self._nodes, **draining_nodes()}
                has_failed = False
            except Exception:  # Ray's head is away, which others notice too
                if not has_failed:
                    log.exception("nodes that are drained can't be seen")
                has_failed = True
                continue
            if known != self._nodes:
                self._nodes = known
                self._inbox.put(None)
