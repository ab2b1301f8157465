"""Start of Ray's head on this machine: its command, its environment, its ports, its token."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from orchestrator.cluster.jobs_api import PYTHON
from orchestrator.errors import ClusterUnreachable, UsageError

START_TIMEOUT_S = 60.0
RAY_DIR = "ray"  # in the temporary directory
STARTED = "Ray runtime started"
WORKER_PORTS = range(10002, 20000)  # Ray's default


def check_free(jobs_port: int) -> None:
    if jobs_port in WORKER_PORTS:
        wrong = f"Ray gives ports {WORKER_PORTS.start} to {WORKER_PORTS.stop - 1} to its workers"
    else:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind(("127.0.0.1", jobs_port))
            except OSError as error:
                wrong = f"it can't be used: {error.strerror}"
    raise UsageError(
        f"port {jobs_port} for the Jobs API: {wrong}",
        remedy="Name another one, like 8265, Ray's own choice.",
        unchanged="Nothing was started.",
    )


def head_command(temp_dir: Path, num_cpus: int, jobs_port: int | None) -> list[str]:
    # Ray itself chooses each port as it binds it: one that is looked for before may be taken when Ray starts, which
    # then waits for 30 s and ends.
    options = {
        "node-ip-address": "127.0.0.1",
        "port": 0,
        "dashboard-agent-listen-port": 0,
        "metrics-export-port": 0,
        "include-log-monitor": "false",  # it reads all logs ten times a second for drivers; ours don't use it
        "include-dashboard": "false" if jobs_port is None else "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": jobs_port or 0,
        "num-cpus": num_cpus,
        "temp-dir": temp_dir / RAY_DIR,
    }
    ray_cli = [sys.executable, "-m", "orchestrator.cluster.local_ray.head_process"]
    return [*ray_cli, "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())]


def head_environment(token_path: Path) -> dict[str, str]:
    """Our environment without what changes how Ray starts; workers inherit it and must import this very package."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    root = str(Path(__file__).parents[2])
    path = [root, *(entry for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != root)]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback stays loopback, see `environment`
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray starts a process per CPU for its first driver's tasks, just when a run's own processes start. None of
        # them can be used: each of ours has its own environment.
        "RAY_prestart_worker_first_driver": "0",
        PYTHON: sys.executable,
        "NO_COLOR": "1",
    }


def await_address(head: "subprocess.Popen[bytes]", temp_dir: Path, log_path: Path) -> str:
    deadline, written = time.monotonic() + START_TIMEOUT_S, temp_dir / RAY_DIR / "ray_current_cluster"
    while time.monotonic() < deadline and head.poll() is None:
        if STARTED in log_path.read_text(errors="replace"):
            with suppress(FileNotFoundError):  # Ray may print this before it has written its address
                if address := written.read_text().strip():
                    return address
        time.sleep(0.05)
    what = f"ended with code {head.returncode}" if head.returncode is not None else f"took over {START_TIMEOUT_S:.0f} s"
    output = "\n".join(log_path.read_text(errors="replace").strip().splitlines()[-5:])
    raise ClusterUnreachable(
        f"Ray did not start on this machine: it {what}. Its last output:\n{output}",
        remedy="Free memory or disk, or look for the cause in that text, and try again.",
        unchanged="Everything begun has been removed.",
    )


def metrics_address(temp_dir: Path) -> str:
    """Where Ray's metrics are, of a head that has started."""
    (written,) = (temp_dir / RAY_DIR / "session_latest").glob("metrics_export_port_*")
    return f"127.0.0.1:{int(written.read_text())}"


def write_secret(path: Path) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(os.urandom(32).hex())
