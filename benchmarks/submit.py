"""How long it takes to have a run through the HTTP port of a cluster's Jobs API, and to ask for its status there.

    python -m benchmarks.submit [--quick]

Two places, one after the other: `here`, a local cluster and its user on one machine; and, where hosts can be made of
network namespaces (Linux, root), `outside`: a cluster of two hosts, and a user on a host that is no part of its network
and reaches that one port, through a relay (`tests/support/outside.py`). Each has served a run of the same text before,
so that the token store is there and files are cached. The job is that of the quickstart.

- `submit_s`: from the start of the command until the run is submitted and the command has returned.
- `first_step_s`: from the start of the command until the run's first step is committed.
- `status_s`: of `orchestrator status` by URL, a job of its own in the cluster.
- `status_inside_s`: of the same command inside the cluster.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Result, Spread, run, say
from orchestrator.cluster import local
from orchestrator.run_records.final_status import has_ended
from orchestrator.run_records.run_history import read_steps
from tests.support.hosts import Hosts
from tests.support.outside import Laptop

ROUNDS, QUICK_ROUNDS = 5, 1
PATIENCE_S = 180.0
JOBS_PORT = 8265  # of hosts of our own
JOB: dict[str, Any] = {
    "schema": "v1",
    "workers": 2,
    "train": {"max_steps": 100_000},
    "data": {"source": "builtin:stdlib"},
}


@dataclass(frozen=True)
class Place:
    """A user, and a cluster that this process can look into by its run storage."""

    storage: Path
    write: Callable[[str, str], object]  # a file of the user's
    by_url: Callable[..., object]  # a command of the user's
    inside: Callable[..., object]  # a command on the cluster's head


def measure(quick: bool) -> Result:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    places: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {"here": _here}
    if Hosts.available() is None:
        places["outside"] = _outside
    found: dict[str, Any] = {}
    for name, made in places.items():
        with tempfile.TemporaryDirectory(prefix="submit-") as folder, made(Path(folder)) as place:
            figures = [_round(place, f"round-{number}") for number in range(rounds + 1)]
        say(f"{name}, the first one warms: {figures}")
        found[name] = {key: Spread.of([figure[key] for figure in figures[1:]]) for key in figures[0]}
    return Result(
        name="submit",
        seed=0,
        settings={"quick": quick, "workers": 2},
        rounds=rounds,
        metrics=found,
    )


def _round(place: Place, name: str) -> dict[str, float]:
    place.write("job.json", json.dumps(JOB | {"name": name, "storage": str(place.storage)}))
    run_dir, began_s = place.storage / name, time.perf_counter()
    place.by_url("submit", "job.json")
    submit_s = time.perf_counter() - began_s
    _until(lambda: (run_dir / "job.json").exists() and bool(read_steps(run_dir)), f"{name} to commit a step")
    figures = {"submit_s": submit_s, "first_step_s": time.perf_counter() - began_s}
    for key, command in (("status_s", place.by_url), ("status_inside_s", place.inside)):
        began_s = time.perf_counter()
        command("status", name)
        figures[key] = time.perf_counter() - began_s
    place.inside("stop", name)
    _until(lambda: has_ended(run_dir), f"{name} to end")
    return {key: round(value, 2) for key, value in figures.items()}


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.perf_counter() + PATIENCE_S
    while not condition():
        if time.perf_counter() > deadline_s:
            raise SystemExit(f"waited {PATIENCE_S:.0f} s for {what}")
        time.sleep(0.05)


@contextmanager
def _here(folder: Path) -> Iterator[Place]:
    laptop = folder / "laptop"
    laptop.mkdir()
    os.environ["ORCHESTRATOR_HOME"] = str(folder / "home")
    port = _free_port()
    record = local.up(4, jobs_port=port).record
    env = {**os.environ, "PYTHONPATH": str(ROOT), **local.environment(record)}

    def command(address: str, *arguments: str) -> None:
        words = [sys.executable, "-m", "orchestrator.cli.main", *arguments, "--address", address]
        done = subprocess.run(words, cwd=laptop, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode != 0:
            raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr}")

    try:
        yield Place(
            storage=folder / "runs",
            write=lambda name, text: (laptop / name).write_text(text),
            by_url=lambda *arguments: command(f"http://127.0.0.1:{port}", *arguments),
            inside=lambda *arguments: command(record.address, *arguments),
        )
    finally:
        local.down()


@contextmanager
def _outside(folder: Path) -> Iterator[Place]:
    storage = folder / "runs"
    storage.mkdir()
    with Hosts(2) as hosts:
        hosts.start_ray(cpus=2, jobs_port=JOBS_PORT)
        with Laptop(hosts, JOBS_PORT, hidden=(storage,)) as laptop:
            ours = [sys.executable, "-m", "orchestrator.cli.main"]

            def inside(*arguments: str) -> None:
                hosts.run(0, [*ours, *arguments], PATIENCE_S)

            yield Place(storage, laptop.write, laptop.command, inside)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(__doc__, measure)
