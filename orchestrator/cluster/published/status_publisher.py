"""Publication of a run's status in the cluster's key-value store, from which `status_reader` reads it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.experimental import internal_kv

from orchestrator.cluster.published.status_reader import KV_NAMESPACE, content_of, status_in
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.status import RunStatus

log = logging.getLogger("orchestrator.control")

EVERY_S = 1.0
RESTARTED_WITHIN_S = 60.0  # after the end of a controller that is lost


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
        status = to_plain(self._read())
        with self._lock:
            if not self._is_closed:
                _put(self._key, status)


@contextmanager
def publishing_the_last(run_id: str) -> Iterator[None]:
    """Publish the status of the run's last controller again and again while the block runs, with a warning: this one
    still opens the run, which takes as long as run storage hangs."""
    done = threading.Event()
    thread = threading.Thread(target=_publish_the_last, args=(run_id.encode(), done), name="last-status", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()  # it must not replace a status of the block's successor


def _publish_the_last(key: bytes, done: threading.Event) -> None:
    since_s = time.monotonic()
    while not done.wait(EVERY_S):
        with suppress(Exception):  # Ray's head fails or is gone: readers ask the Scheduler
            if (status := _published(key)) is not None:
                waits_s = time.monotonic() - since_s
                warning = f"its controller has been restarted, and has waited {waits_s:.0f} s for run storage"
                _put(key, {**status, "warning": warning})


def last_published(run_id: str) -> RunStatus | None:
    """The status that a run's last controller published; None if it may be of an earlier attempt, or can't be read."""
    try:
        status = _published(run_id.encode())
        return None if status is None else from_plain(RunStatus, status)
    except Exception:  # Ray has several for a head that doesn't answer
        log.exception("the status of run %s can't be read", run_id)
        return None


def _published(key: bytes) -> dict[str, Any] | None:
    """The status in plain form, unless it may be of an earlier attempt."""
    content = internal_kv._internal_kv_get(key, namespace=KV_NAMESPACE)
    if content is None:
        return None
    status, published_time = status_in(content)
    return status if time.time() - published_time <= RESTARTED_WITHIN_S else None


def _put(key: bytes, status: object) -> None:
    content = content_of(status, time.time())
    internal_kv._internal_kv_put(key, content, overwrite=True, namespace=KV_NAMESPACE)
