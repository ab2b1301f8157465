"""Ray cluster on this machine, for `orchestrator cluster up | status | down` and for `orchestrator run`.

The head is `ray start --head --block` in its own session, so it outlives the terminal; it listens on loopback only,
asks for a token, and keeps its files in its own temporary directory. The cluster is recorded in

    $ORCHESTRATOR_HOME/clusters/local/    (default ~/.orchestrator)
      cluster.json   the `ClusterRecord`: address, processes with their starts
      token          the secret, readable by its owner only
      head.log       output of Ray's processes while they started
      scrape.json    metrics target for Prometheus, in the format of `file_sd_configs`

`down` ends the recorded processes and everything in their session, and nothing else: a pid that another process has
since reused is recognised by its start.
"""

import fcntl
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from orchestrator.cluster.local_head import (
    await_address,
    check_free,
    head_command,
    head_environment,
    metrics_address,
    write_secret,
)
from orchestrator.cluster.processes import Process, describe, end_session, is_running, living_of
from orchestrator.errors import OrchestratorError, ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.storage.atomic import write_atomically
from orchestrator.storage.backends.home import home

TEMP_ROOT = Path("/tmp")  # Ray's socket paths must stay below 108 bytes, whatever TMPDIR says


@dataclass(frozen=True)
class ClusterRecord:
    """The local cluster, as cluster.json keeps it. Times are `time.time()` seconds."""

    address: str
    num_cpus: int  # logical: may exceed the machine's
    temp_dir: str
    token_path: str
    log_path: str
    started_time: float
    head: Process
    processes: tuple[Process, ...]  # those started with the head; workers come and go
    metrics_address: str = ""  # where Prometheus scrapes; empty in records older than the metrics


@dataclass(frozen=True)
class Up:
    """The running cluster; `fresh` if this call started it."""

    record: ClusterRecord
    fresh: bool


def state_dir() -> Path:
    """Directory of the local cluster's record."""
    return home() / "clusters" / "local"


def up(num_cpus: int, jobs_port: int | None = None) -> Up:
    """Start a cluster with `num_cpus` logical CPUs, unless one is up already, which is returned unchanged.

    Args:
        jobs_port: port of Ray's Jobs API and dashboard, on loopback; None for none.

    Raises:
        UsageError: the port is taken, or one of those that Ray gives to its workers.
        ClusterUnreachable: Ray did not start; everything begun has been removed again.
    """
    directory = state_dir()
    with _locked(directory):
        present = _present(directory)
        if present is not None:
            return Up(present, fresh=False)
        if jobs_port is not None:
            check_free(jobs_port)
        return Up(_start(directory, num_cpus, jobs_port), fresh=True)


def status() -> ClusterRecord | None:
    """The running cluster; None if there is none. Removes what a crashed one left behind."""
    directory = state_dir()
    if not (directory / "cluster.json").exists():
        return None
    with _locked(directory):
        return _present(directory)


def down() -> ClusterRecord | None:
    """End the local cluster with all its processes, workers included; None if none was up.

    Raises:
        OrchestratorError: a process did not end; the record stays, so that `down` can be tried again.
    """
    directory = state_dir()
    if not (directory / "cluster.json").exists():
        return None
    with _locked(directory):
        record = _present(directory)
        if record is not None:
            _end(record)
            _forget(directory, record)
        return record


def environment(record: ClusterRecord) -> dict[str, str]:
    """Environment variables that a process needs before it imports Ray, to connect."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": record.token_path,
        "RAY_ADDRESS": record.address,
        # Else Ray 2.60 replaces 127.0.0.1 by this machine's outer address, where the cluster does not listen.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _present(directory: Path) -> ClusterRecord | None:
    """The recorded cluster if its head is alive. The caller holds the lock.

    Raises:
        OrchestratorError: the record can't be read.
    """
    path = directory / "cluster.json"
    try:
        record = from_plain(ClusterRecord, json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ProtocolError as error:
        raise OrchestratorError(
            f"the record of the local cluster, {path}, can't be read: {error.message}",
            remedy="End the cluster with the version that started it, or its head yourself, and delete that file.",
            unchanged="Nothing was changed.",
        ) from error
    if is_running(record.head):
        return record
    _end(record)  # the head is gone: the rest of its session is useless
    _forget(directory, record)
    return None


def _start(directory: Path, num_cpus: int, jobs_port: int | None) -> ClusterRecord:
    token_path, log_path = directory / "token", directory / "head.log"
    write_secret(token_path)
    temp_dir = Path(tempfile.mkdtemp(prefix="orc-", dir=TEMP_ROOT))  # private; Ray makes its own accessible to all
    with log_path.open("wb") as log:
        head = subprocess.Popen(
            head_command(temp_dir, num_cpus, jobs_port),
            env=head_environment(token_path),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    started_time, leader = time.time(), describe(psutil.Process(head.pid), "ray start")
    record = ClusterRecord("", num_cpus, str(temp_dir), str(token_path), str(log_path), started_time, leader, (leader,))
    try:
        _save(directory, record)  # before it is ready: `down` finds it even if we are killed
        address = await_address(head, temp_dir, log_path)
        metrics = metrics_address(temp_dir)
    except BaseException:
        end_session(record.head, record.processes)
        _forget(directory, record)
        raise
    processes = tuple(describe(process) for process in living_of(leader, (leader,)))
    record = replace(record, address=address, processes=processes, metrics_address=metrics)
    _save(directory, record)
    # Ray writes such a list too, but only with its dashboard. The port changes each time, the file's path does not.
    _replace(directory / "scrape.json", [{"targets": [metrics], "labels": {"job": "ray"}}])
    return record


def _end(record: ClusterRecord) -> None:
    left = end_session(record.head, record.processes)
    if left:
        names = ", ".join(f"{process.pid} ({process.name})" for process in left)
        raise OrchestratorError(
            f"processes of the local cluster did not end: {names}",
            remedy="End them yourself, then run `orchestrator cluster down` again.",
            unchanged="The cluster's record was kept.",
        )


def _save(directory: Path, record: ClusterRecord) -> None:
    _replace(directory / "cluster.json", to_plain(record))


def _replace(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _forget(directory: Path, record: ClusterRecord) -> None:
    shutil.rmtree(record.temp_dir, ignore_errors=True)
    for name in ("token", "scrape.json", "cluster.json"):
        (directory / name).unlink(missing_ok=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Serialise starts and stops: two `up` at once must not start two clusters."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)  # regardless of its creator and umask
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
