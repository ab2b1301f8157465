"""Calls that keep a run's workers alive while its new controller still opens the run from run storage.

A worker exits when no controller has called it for a while. A controller that Ray has restarted knows nothing until it
has read the journal, and storage may hang: it only calls meanwhile, and directs none of them.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.remote import Remote
from orchestrator.protocol.actors import WorkerApi

log = logging.getLogger("orchestrator.control")

EVERY_S = 5.0


@contextmanager
def keeping_workers_alive(run_id: str) -> Iterator[None]:
    """Call every worker of the run periodically while the block runs."""
    done = threading.Event()
    threading.Thread(target=_call, args=(run_id, done), name="keep-alive", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _call(run_id: str, done: threading.Event) -> None:
    while not done.wait(EVERY_S):
        try:
            for name in names_of(run_id):
                handle = find(name) if name.startswith(f"{run_id}/worker/") else None
                if handle is not None:
                    Remote[WorkerApi](handle, is_hosted=True).send(WorkerApi.report, None, -1, 0.0)
        except Exception:  # Ray's head is slow to answer: the next round tries again
            log.exception("run %s: its workers could not be called", run_id)
