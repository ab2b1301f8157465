"""A local MLflow server as a child process.

with MlflowServer("sqlite:////runs/mlflow.db", port=5000) as server:
    server.wait()
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.tracking.sinks.sink import artifact_root, check_uri, is_directory, redacted, with_driver

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
EVERYWHERE = ("0.0.0.0", "::")
PRIORITY = 15  # that of Ray's workers, so that serving pages doesn't slow a run on the same machine


class MlflowServer:
    """`mlflow server` in a session of its own; its output goes to `log`, or to this process's stderr.

    Args:
        port: 0 for any free port.
        artifacts: directory of artifacts, unless the database is an sqlite file: then they are beside it.
        names: host names that browsers may use for it, besides `host`.

    Raises:
        UsageError: the URI is not that of a database, or the port is taken.
        OrchestratorError: it did not start.
    """

    def __init__(
        self,
        uri: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        artifacts: str = "",
        log: Path | None = None,
        names: Sequence[str] = (),
    ) -> None:
        check_uri(uri)
        root = artifact_root(uri, artifacts)
        if root is None:
            raise UsageError(f"{redacted(uri)} is a server already", remedy="Open it in a browser.")
        self.port = _free_port(host, port)
        self.url = f"http://{host}:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(self.port)]
        command += ["--default-artifact-root", root, "--workers", "1"]
        places = [f"{name}:{self.port}" for name in (*names_of(host), *names)]
        # MLflow's default would admit 10.evil.example, which is a name and not an address of a private network.
        command += ["--allowed-hosts", ",".join(places)]
        command += ["--cors-allowed-origins", ",".join(f"http://{place}" for place in places)]
        variables = {
            "MLFLOW_BACKEND_STORE_URI": with_driver(uri),  # not on the command line, which others can read
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false",  # overrides our own environment
        }
        if is_directory(uri):
            variables["MLFLOW_ALLOW_FILE_STORE"] = "true"
        sink = log.open("ab") if log is not None else None
        try:
            self.process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=sink or sys.stderr,
                stderr=sink or sys.stderr,
                start_new_session=True,
            )
        finally:
            if sink is not None:
                sink.close()
        with suppress(OSError):  # it has ended; `_await_answer` reports that
            os.setpriority(os.PRIO_PROCESS, self.process.pid, PRIORITY)  # its children inherit it
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Wait until it ends by itself."""
        self.process.wait()

    def stop(self) -> None:
        """End all of its processes: with SIGTERM, then with SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_TIMEOUT_S)

    def kill(self) -> None:
        """Kill all of its processes, as a failing machine would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _await_answer(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise OrchestratorError(
                    f"the MLflow server ended with code {self.process.returncode} before it answered",
                    remedy="See the end of its output.",
                )
            with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2.0):
                return
            time.sleep(0.1)
        raise OrchestratorError(f"the MLflow server did not answer within {START_TIMEOUT_S:.0f} s")


def names_of(host: str) -> list[str]:
    """Host names that browsers may use for a server listening at `host`. Any other name may be a DNS entry of a foreign
    site that points here."""
    if host not in EVERYWHERE:
        return LOOPBACK if host in LOOPBACK else [f"[{host}]" if ":" in host else host]
    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    v4 = [address.address for address in found if address.family == socket.AF_INET]
    v6 = [
        f"[{address.address}]" for address in found if address.family == socket.AF_INET6 and "%" not in address.address
    ]
    return list(dict.fromkeys([*LOOPBACK, socket.gethostname(), *v4, *v6]))


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"{host}:{port} can't be listened on: {error.strerror}", remedy="Name another with --port."
            ) from error
        return int(probe.getsockname()[1])
