"""Ranks of a world on hosts of `tests.support.hosts`, without Ray.

with Hosts(4) as hosts, HostRanks(hosts) as ranks:
    results = ranks.run(function, *args)   # function(rank, world_size, store, prefix, address, *args) on each rank
"""

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self

from orchestrator.controller.worker_env import WORKER_ENV
from tests.support.hosts import Hosts

PATIENCE_S = 300.0
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | WORKER_ENV  # memory as the product's workers have it


class HostRanks:
    """Starts a process on each host, or those that are asked for; the first call waits for them.

    Args:
        homes: by rank, its host; the first one is host 0.
    """

    def __init__(self, hosts: Hosts, homes: Sequence[int] | None = None) -> None:
        self._hosts, self._numbers = hosts, itertools.count()
        self._homes = tuple(homes or range(len(hosts.addresses)))
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for index in self._homes:
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-m", "tests.support.host_ranks", str(theirs.fileno())]
                env = {**os.environ, **ENVIRONMENT}
                self._processes.append(hosts.popen(index, command, pass_fds=[theirs.fileno()], env=env))
            self._pipes.append(ours)
        self._pipes[0].send((hosts.addresses[0],))
        self._port = int(self._answer(0))

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = PATIENCE_S) -> list[Any]:
        """What `function` returned on every rank. AssertionError with the traceback if it raised on any."""
        prefix, head = f"run/{next(self._numbers)}", self._hosts.addresses[0]
        for rank, pipe in enumerate(self._pipes):
            where = (rank, len(self._pipes), head, self._port, prefix, self._hosts.addresses[self._homes[rank]])
            pipe.send((function, where, args))
        return [self._answer(rank, timeout_s) for rank in range(len(self._pipes))]

    def _answer(self, rank: int, timeout_s: float = PATIENCE_S) -> Any:
        assert self._pipes[rank].poll(timeout_s), f"rank {rank} gave no answer within {timeout_s} s"
        ok, value = self._pipes[rank].recv()
        assert ok, value
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for pipe in self._pipes:
            pipe.close()


def serve(pipe: Connection) -> None:
    """Answer calls until there are no more; the first rank keeps the rendezvous store."""
    import torch

    from orchestrator.comm.transport.rendezvous import RendezvousServer, connect_store
    from orchestrator.engine.process_groups import disconnect

    torch.set_num_threads(1)
    keeper: Any = None
    while True:
        order = pipe.recv()
        try:
            if len(order) == 1:
                keeper = RendezvousServer(order[0])
                pipe.send((True, keeper.address()[1]))
                continue
            function, (rank, size, head, port, prefix, address), args = order
            store = connect_store(head, port)
            try:
                pipe.send((True, function(rank, size, store, prefix, address, *args)))
            finally:
                disconnect()
        except Exception:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
