"""Memory that runs without workers take on a cluster's head.

    python -m benchmarks.head [--quick]

Ten runs wait for room that another run has. Each is a controller then, and the child process that makes its storage
calls; what served the start of the run has ended. `runs_mb` is the proportional set size (PSS) of all that belongs to
them, and of the Scheduler; Ray's own processes are left out. A paused run has no process at all.
"""

import re
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.harness import Result, at_most, run, say
from orchestrator.cluster.actors import names_of
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.protocol.status import RunPhase
from tests.support.control import Cluster, local_ray
from tests.support.hosts import until
from tests.support.simulated_services import simulated_parts

CPUS = 4
RUNS, QUICK_RUNS = 10, 1
PATIENCE_S = 300.0  # runs start one after the other on a few cores
SETTLE_S = 5.0  # after the last process ended
MB = 2**20
OURS = re.compile(r"ray::(?:(?P<service>controller|tracker|rendezvous|preparation) (?P<run>\w+)|(?P<head>scheduler))")
CHILD = re.compile(r"storage_process (?P<service>\w+) (?P<run>\w+)")


def measure(quick: bool) -> Result:
    num_runs = QUICK_RUNS if quick else RUNS
    with local_ray(num_cpus=CPUS), tempfile.TemporaryDirectory(prefix="head-") as folder:
        cluster = Cluster(Path(folder))
        parts = replace(simulated_parts(), tracker=ActorClasses().tracker)
        job = {
            "workers": {"min": CPUS, "max": CPUS, "initial": CPUS},
            "resources": {"cpus": 1},
            "train": {"max_steps": 1_000_000, "global_batch_size": 16, "micro_batch_size": 4},
        }
        cluster.submit("busy", **job)
        cluster.until("busy", lambda s: s.workers_now == CPUS, PATIENCE_S)
        waiting = [f"waits{number}" for number in range(num_runs)]
        for name in waiting:
            cluster.submit(name, wait=True, parts=parts, **job)
        for name in waiting:
            cluster.until(name, lambda s: s.phase is RunPhase.QUEUED, PATIENCE_S)
            until(lambda name=name: names_of(name) == [f"{name}/controller"], PATIENCE_S, "the end of its services")
            say(f"{name} has its controller only")
        time.sleep(SETTLE_S)
        found = memory_of(waiting)
        for name in (*waiting, "busy"):
            cluster.ask("stop", name)
            cluster.end_of(name)
    runs_mb = sum(sum(sizes) for sizes in found.values())
    per_run_mb = (runs_mb - sum(found.get("scheduler", []))) / num_runs
    return Result(
        name="head",
        seed=0,
        settings={"quick": quick, "runs": num_runs},
        rounds=1,
        metrics={
            "runs_mb": runs_mb,
            "per_run_mb": per_run_mb,
            "hundred_runs_mb": runs_mb + (100 - num_runs) * per_run_mb,  # computed, not measured
            **{f"{what}_mb": sum(sizes) / len(sizes) for what, sizes in found.items()},
        },
        bars=(at_most("runs_mb", 2000, runs_mb),),
    )


def memory_of(runs: list[str]) -> dict[str, list[float]]:
    """PSS in MB of the processes of these runs, and of the Scheduler, by what they are."""
    found = defaultdict[str, list[float]](list)
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline())
        match = OURS.search(line) or CHILD.search(line)
        if match is None:
            continue
        named = match.groupdict()
        if named.get("head") or named.get("run") in runs:
            what = named.get("head") or f"{named['service']}" + "_child" * (match.re is CHILD)
            found[what].append(process.memory_full_info().pss / MB)
    return found


if __name__ == "__main__":
    run(__doc__, measure)
