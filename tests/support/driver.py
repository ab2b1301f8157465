"""A client of a cluster of `tests.support.hosts`, in a process on one of its hosts, that a test talks to.

with Driver(hosts, 0) as driver:
    status = driver.call(OrchestratorClient.get, run_id)   # function(client, *args), any that can be imported
"""

import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self

from tests.support.hosts import Hosts

PATIENCE_S = 120.0


class Driver:
    """Starts connecting at once; the first call waits for it."""

    def __init__(self, hosts: Hosts, index: int) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "tests.support.driver", str(theirs.fileno())]
            self._process = hosts.popen(index, command, pass_fds=[theirs.fileno()])

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = PATIENCE_S) -> Any:
        """What `function(client, *args)` returns there. AssertionError with its traceback if it raises."""
        self._pipe.send((function, args))
        assert self._pipe.poll(timeout_s), f"{function.__name__} gave no answer within {timeout_s} s"
        ok, value = self._pipe.recv()
        assert ok, value
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def serve(pipe: Connection) -> None:
    """Answer calls until the test has no more."""
    from orchestrator.client import OrchestratorClient

    client: OrchestratorClient | None = None
    while True:
        function, args = pipe.recv()
        try:
            client = client or OrchestratorClient()
            pipe.send((True, function(client, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
