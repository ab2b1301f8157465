"""Publication of a run's status in the cluster's key-value store, from which `status_reader` reads it."""

import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from ray.experimental import internal_kv

from orchestrator.cluster.published.status_reader import KV_NAMESPACE
from orchestrator.protocol.codec import to_plain
from orchestrator.protocol.status import RunStatus

log = logging.getLogger("orchestrator.control")

EVERY_S = 1.0


class StatusPublisher:
    """Publishes the status each second, and when the run's state has changed. It does so in its own thread, since Ray's
    head may be slow to answer.

    Args:
        read: returns the run's status.
    """

    def __init__(self, run_id: str, read: Callable[[], RunStatus]) -> None:
        self._key, self._read = run_id.encode(), read
        self._changed, self._lock, self._is_closed = threading.Event(), threading.Lock(), False
        self._state: object = None

    def start(self) -> None:
        threading.Thread(target=self._serve, name="status", daemon=True).start()

    def note(self, state: object) -> None:
        """Publish the status soon if the run's state is another one than before."""
        if state is not self._state:
            self._state = state
            self._changed.set()

    def close(self) -> None:
        """Withdraw the status: from now on the Scheduler is asked, which knows a run's end."""
        with self._lock:
            self._is_closed = True
            self._changed.set()  # its thread ends
            with suppress(Exception):  # without Ray's head nothing is read, either
                internal_kv._internal_kv_del(self._key, namespace=KV_NAMESPACE)

    def _serve(self) -> None:
        has_failed = False
        while not self._is_closed:
            try:
                self._publish()
                has_failed = False
            except Exception:  # while Ray's head is unreachable; readers see how old the last one is
                if not has_failed:
                    log.exception("the run's status can't be published")
                has_failed = True
            self._changed.wait(EVERY_S)
            self._changed.clear()

    def _publish(self) -> None:
        content = json.dumps(to_plain(self._read())).encode()
        with self._lock:
            if not self._is_closed:
                internal_kv._internal_kv_put(self._key, content, overwrite=True, namespace=KV_NAMESPACE)
