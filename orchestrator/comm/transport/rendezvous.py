"""The run's rendezvous store: one TCP store that starts before the first generation and outlives every worker.

Hosted in its own process. Generations connect through it, each under its own prefix
(`orchestrator.engine.process_groups`). A connected generation no longer needs the store: if it dies, training
continues, and the next generation uses its replacement.
"""

import socket
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

CONNECT_TIMEOUT_S = 60.0


class RendezvousServer:
    """Hosts the store. `host` is the address that workers reach; the system chooses a free port."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._store = TCPStore(host, 0, None, is_master=True, wait_for_workers=False)

    def address(self) -> tuple[str, int]:
        return self._host, int(self._store.port)


def connect_store(host: str, port: int) -> Store:
    """Connect to the run's store. Raises OSError if nothing answers: a plan may name a store that has died."""
    socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()  # torch would try for two minutes
    return TCPStore(
        host, port, None, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_TIMEOUT_S)
    )
