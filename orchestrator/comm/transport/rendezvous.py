"""The run's rendezvous store: one TCP store that is up before the first generation and outlives every worker.

Hosted in a process of its own. Generations meet in it under a prefix each (`orchestrator.engine.process_groups`).
Whoever has met needs it no more: if it dies, training goes on, and the next generation meets in the one that came in
its place.
"""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

CONNECT_TIMEOUT_S = 60.0


class RendezvousServer:
    """Holds the store. `host` is the address that workers reach; the port is free and chosen by the system."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._store = TCPStore(host, 0, None, is_master=True, wait_for_workers=False)

    def address(self) -> tuple[str, int]:
        return self._host, int(self._store.port)


def connect_store(host: str, port: int) -> Store:
    """A client of the run's store. Raises OSError where nothing answers: a plan may name one that has died."""
    socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()  # torch would try for two minutes
    return TCPStore(
        host, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_TIMEOUT_S)
    )
