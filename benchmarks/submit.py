"""How long it takes to have a run through the HTTP port of a cluster's Jobs API, and to ask for its status there.

    python -m benchmarks.submit [--quick]

A local cluster that has served a run of the same text before, so that the token store is there and files are cached.
The job is that of the quickstart.

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
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Result, Spread, run, say
from orchestrator.control import local_cluster
from orchestrator.control.memory import read_steps

ROUNDS, QUICK_ROUNDS = 5, 1
PATIENCE_S = 180.0
JOB: dict[str, Any] = {
    "schema": "v1",
    "workers": 2,
    "train": {"steps": 100_000},
    "data": {"source": "builtin:stdlib"},
}


def measure(quick: bool) -> Result:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    found: dict[str, list[float]] = {"submit_s": [], "first_step_s": [], "status_s": [], "status_inside_s": []}
    with tempfile.TemporaryDirectory(prefix="submit-") as folder:
        os.environ["ORCHESTRATOR_HOME"] = str(Path(folder) / "home")
        port = _free_port()
        record = local_cluster.up(4, jobs_port=port).record
        try:
            for number in range(rounds + 1):  # the first one warms
                figures = _round(Path(folder), f"round-{number}", f"http://127.0.0.1:{port}", record)
                say(f"round {number}: {figures}")
                for name, value in figures.items():
                    found[name] += [value] if number else []
        finally:
            local_cluster.down()
    return Result(
        name="submit",
        seed=0,
        settings={"quick": quick, "workers": 2},
        rounds=rounds,
        metrics={name: Spread.of(values) for name, values in found.items()},
    )


def _round(folder: Path, name: str, url: str, record: local_cluster.ClusterRecord) -> dict[str, float]:
    laptop = folder / "laptop"
    laptop.mkdir(exist_ok=True)
    storage = folder / "runs"
    (laptop / "job.json").write_text(json.dumps(JOB | {"name": name, "storage": str(storage)}))
    began_s = time.perf_counter()
    _command(laptop, record, "submit", "job.json", "--address", url)
    submit_s = time.perf_counter() - began_s
    while not (storage / name / "job.json").exists() or not read_steps(storage / name):
        if time.perf_counter() - began_s > PATIENCE_S:
            raise SystemExit(f"{name} has committed no step within {PATIENCE_S:.0f} s")
        time.sleep(0.05)
    first_step_s = time.perf_counter() - began_s
    figures = {"submit_s": submit_s, "first_step_s": first_step_s}
    for key, address in (("status_s", url), ("status_inside_s", record.address)):
        began_s = time.perf_counter()
        _command(laptop, record, "status", name, "--address", address)
        figures[key] = time.perf_counter() - began_s
    _command(laptop, record, "cancel", name, "--address", record.address)
    while not (storage / name / "status.json").exists():
        time.sleep(0.05)
    return {key: round(value, 2) for key, value in figures.items()}


def _command(directory: Path, record: local_cluster.ClusterRecord, *arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **local_cluster.environment(record)}
    command = [sys.executable, "-m", "orchestrator.cli.main", *arguments]
    subprocess.run(command, cwd=directory, env=env, check=True, capture_output=True, timeout=PATIENCE_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(__doc__, measure)
