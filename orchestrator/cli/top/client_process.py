"""A client of the cluster in a child process, for a screen that outlives the cluster.

Ray joins one cluster in the life of a process and can't leave one that has died; and its output would spoil the screen.
So a child process calls the cluster, and when the cluster is lost another child replaces it.
"""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from orchestrator.errors import ClusterUnreachable, OrchestratorError
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.status import RunStatus

PATIENCE_S = 75.0  # a client gives up after 65


@dataclass(frozen=True)
class Reply:
    """The outcome of a call. `is_lost`: the connection can't be used any more."""

    address: str
    value: Any = None
    error: OrchestratorError | None = None
    is_lost: bool = False


class ClusterLink:
    """Methods of an `OrchestratorClient`, for any thread, one call at a time.

    Args:
        address: as of an `OrchestratorClient`. With None a local cluster that starts later is found, too.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address or ""
        self._wanted, self._lock = address, threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def list(self) -> tuple[RunStatus, ...]:
        found: tuple[RunStatus, ...] = self._ask("list")
        return found

    def get(self, run_id: str) -> RunStatus:
        found: RunStatus = self._ask("get", run_id)
        return found

    def scale(self, run_id: str, workers: int | None) -> DesiredRunState:
        target: DesiredRunState = self._ask("scale", run_id, workers)
        return target

    def pause(self, run_id: str) -> DesiredRunState:
        target: DesiredRunState = self._ask("pause", run_id)
        return target

    def stop(self, run_id: str) -> DesiredRunState:
        target: DesiredRunState = self._ask("stop", run_id)
        return target

    def close(self) -> None:
        """Kill the process, even if it waits for an answer."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _ask(self, method: str, *args: Any) -> Any:
        """Raises what the client's method raises, and ClusterUnreachable if its process does not answer."""
        with self._lock:
            pipe = self._start() if self._process is None or self._pipe is None else self._pipe
            try:
                pipe.send((method, args))
                if not pipe.poll(PATIENCE_S):
                    raise EOFError
                reply: Reply = pipe.recv()
            except (EOFError, OSError) as error:
                self.close()
                raise ClusterUnreachable("the process that talks to the cluster did not answer") from error
            self.address = reply.address or self.address
            if reply.is_lost:
                self.close()
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # Ray's threads don't survive a fork, nor do Textual's
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(self._wanted, theirs), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours
        return ours


def serve(address: str | None, pipe: Connection) -> None:
    """Main function of the child process: answers calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that draws on the terminal
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    client: Any = None
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            os._exit(0)  # leaving a dead cluster would never end
        try:
            client = client or _connect(address)
            reply = Reply(client.address, getattr(client, method)(*args))
        except OrchestratorError as error:
            reply = Reply(address or "", error=error, is_lost=isinstance(error, ClusterUnreachable) and _has_joined())
        except Exception as error:  # any error of Ray while a cluster ends
            message = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            reply = Reply(address or "", error=ClusterUnreachable(message), is_lost=True)
        pipe.send(reply)


def _connect(address: str | None) -> Any:
    from orchestrator.client import OrchestratorClient

    return OrchestratorClient(address)


def _has_joined() -> bool:
    import ray

    return bool(ray.is_initialized())
