"""A client of the cluster in a child process, for a screen that outlives the cluster.

Ray joins one cluster in the life of a process and can't leave one that has died; and its output would spoil the screen.
So a child process calls the cluster, and when the cluster is lost another child replaces it.

Its first answer takes seconds beside a run on all cores. Until then the statuses that runs publish are listed.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from subprocess import DEVNULL, Popen
from typing import Any

from orchestrator.cluster.connection import find_cluster
from orchestrator.cluster.published.status_reader import published_statuses
from orchestrator.errors import ClusterUnreachable, OrchestratorError
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
        address: as of an `OrchestratorClient`; None for the local cluster, also one that starts later.

    Attributes:
        is_joining: whether the process joins the cluster: until then `list` returns published statuses, and other calls
            wait.
    """

    def __init__(self, address: str | None) -> None:
        self.address, self.is_joining = address or "", False
        self._wanted, self._lock = address, threading.Lock()
        self._process: Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._published: dict[str, RunStatus] = {}
        self._joining: threading.Thread | None = None

    def begin(self, run_id: str | None) -> tuple[RunStatus, ...]:
        """Return statuses at once if runs publish them, `run_id` among them unless it is None: the cluster is joined
        only from the first call on, as joining takes a core for seconds. Else join it, and return those of all runs.

        Raises:
            ClusterUnreachable: there is no cluster, or it doesn't answer.
            NotAllowed: the cluster refused the token.
            NotFound: it has no run `run_id`.
        """
        self.address = find_cluster(self._wanted)
        self._read_published()
        if self._published and (run_id is None or run_id in self._published):
            self.is_joining = True
            return tuple(self._published.values())
        if run_id is not None:
            self.get(run_id)
        return self.list()

    def list(self) -> tuple[RunStatus, ...]:
        if self.is_joining:
            if self._joining is None:
                self._joining = threading.Thread(target=self._join, daemon=True)
                self._joining.start()
            self._read_published()
            return tuple(self._published.values())
        found: tuple[RunStatus, ...] = self._ask("list")
        return found

    def get(self, run_id: str) -> RunStatus:
        found: RunStatus = self._ask("get", run_id)
        return found

    def scale(self, run_id: str, workers: int | None) -> None:
        self._ask("scale", run_id, workers)

    def pause(self, run_id: str) -> None:
        self._ask("pause", run_id)

    def stop(self, run_id: str) -> None:
        self._ask("stop", run_id)

    def close(self) -> None:
        """Kill the process, even if it waits for an answer."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _read_published(self) -> None:
        """Update the published statuses. One that is not read now stays: its controller may be busy, or has ended."""
        self._published |= {status.run_id: status for status in published_statuses(self._wanted)}

    def _join(self) -> None:
        try:
            with suppress(OrchestratorError, OSError):  # raised again by the next call
                self._ask("list")
        finally:
            self.is_joining = False

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
        # By no means of `multiprocessing`, which can't start a process where Textual has the terminal.
        ours, theirs = Pipe()
        address = [] if self._wanted is None else [self._wanted]
        command = [sys.executable, "-m", "orchestrator.cli.top.client_process", str(theirs.fileno()), *address]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # whatever made modules known here
        fds = [theirs.fileno()]  # and nowhere else: Ray's output would spoil the screen
        self._process = Popen(command, env=env, pass_fds=fds, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        theirs.close()
        self._pipe = ours
        return ours


def serve(address: str | None, pipe: Connection) -> None:
    """Main function of the child process: answers calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that draws on the terminal
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

    if address is None:
        os.environ.pop("RAY_ADDRESS", None)  # of the local cluster that was found first: there may be another by now
    return OrchestratorClient(address)


def _has_joined() -> bool:
    import ray

    return bool(ray.is_initialized())


if __name__ == "__main__":
    from orchestrator.cli.top import client_process as module  # answers are pickled under the module's own name

    module.serve(next(iter(sys.argv[2:]), None), Connection(int(sys.argv[1])))
