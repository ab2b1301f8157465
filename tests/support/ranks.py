"""Real ranks: processes that stay up over many tests, since torch and deepspeed take seconds to import.

results = ranks.run(function, world_size, *args)   # function(rank, world_size, store, prefix, *args) on each rank

Their groups are gloo's, or on GPUs nccl's, which on an emulated one gloo plays.
"""

import contextlib
import itertools
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.support import devices, forks

PATIENCE_S = 100.0


def _serve(pipe: Connection, device: str, plain_attention: bool, is_shared: bool) -> None:
    forks.begin({})
    import torch

    torch.set_num_threads(1)
    devices.use(device, plain_attention, is_shared)
    with contextlib.suppress(EOFError):
        while True:
            function, rank, world_size, port, prefix, args = pipe.recv()
            try:
                from orchestrator.comm.transport.rendezvous import connect_store
                from orchestrator.engine.process_groups import disconnect

                store = connect_store("127.0.0.1", port)
                try:
                    pipe.send((True, function(rank, world_size, store, prefix, *args)))
                finally:
                    disconnect()
            except Exception:
                pipe.send((False, traceback.format_exc()))


class Ranks:
    """A pool of rank processes, grown as needed.

    Args:
        device, plain_attention, is_shared: of all ranks, as `devices.use` takes them.
    """

    def __init__(self, device: str = devices.CPU, plain_attention: bool = False, is_shared: bool = False) -> None:
        from orchestrator.comm.transport.rendezvous import RendezvousServer

        self.device, self._how = device, (device, plain_attention, is_shared)
        self._server = RendezvousServer("127.0.0.1")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._numbers = itertools.count()

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = PATIENCE_S
    ) -> list[Any]:
        """What `function` returned on every rank. AssertionError with the tracebacks if it raised on any. Skips the
        test where there are fewer GPUs than ranks, as nccl refuses two ranks on one."""
        if self.device == devices.GPU and not self._how[-1]:
            import torch

            if world_size > torch.cuda.device_count():
                pytest.skip(f"{world_size} ranks need {world_size} GPUs, of which {torch.cuda.device_count()} are here")
        while len(self._pipes) < world_size:
            ours, theirs = forks.context.Pipe()
            process = forks.start(_serve, theirs, *self._how)
            self._pipes.append(ours)
            self._processes.append(process)
        _, port = self._server.address()
        prefix = f"test/{next(self._numbers)}"
        for rank in range(world_size):
            self._pipes[rank].send((function, rank, world_size, port, prefix, args))
        answers = []
        for rank in range(world_size):
            if not self._pipes[rank].poll(timeout_s):
                self.close()
                raise AssertionError(f"rank {rank} of {world_size} gave no answer within {timeout_s} s")
            answers.append(self._pipes[rank].recv())
        failures = [text for ok, text in answers if not ok]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes.clear()
        self._processes.clear()
