"""How soon a node that appears is used, and whether one that is to go is left in time.

    python -m benchmarks.elasticity [--quick]

A run with `autoscale.policy: available` and the model of `benchmarks.rescale` on two hosts, one worker on each; the
hosts are made of network namespaces, which takes Linux and root, and all share this machine's cores. In each round a
third host joins the cluster, is drained with a deadline of 10 s, and taken away once nothing of the run is on it.

- `join_to_use_s`: from the moment at which Ray knows the node to the end of the first step that a worker on it has
  done. Ray's own start before it, `ray_start_s`, isn't ours.
  Of it, `decide_s` is until the scheduler has asked the run to grow, `warm_s` until the new worker is warm.
- `join_stall_s`: how long training stood still for that worker.
- `drain_off_s`: from the notice to the moment at which no process of the run is on the host any more;
  `drain_stall_s`: how long training stood still meanwhile. `drain_steps_lost` counts committed steps that were lost and
  finished ones that were done again.
"""

import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import Result, Spread, at_most, equals, median_interval, run, say
from benchmarks.recovery import job_of
from benchmarks.rescale import MODEL, QUICK_MODEL
from benchmarks.support.data import prepared_storage
from benchmarks.support.host_losses import HostedRun, hosted_run
from orchestrator.protocol.status import Rescale
from orchestrator.run_records.run_files import RunFiles
from orchestrator.spec.workers import AutoscaleSpec, WorkersSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events
from tests.support.hosts import Hosts, until

WORKERS = 2
DEADLINE_S = 10.0
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Join:
    ray_start_s: float
    decide_s: float
    warm_s: float
    use_s: float
    stall_s: float


@dataclass(frozen=True)
class Drain:
    off_s: float
    stall_s: float
    steps_lost: int


def measure(quick: bool) -> Result:
    if (why := Hosts.available()) is not None:
        raise SystemExit(f"this benchmark needs hosts of its own: {why}")
    rounds = 1 if quick else 7
    joins, drains = list[Join](), list[Drain]()
    with tempfile.TemporaryDirectory(prefix="elasticity-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, storage = there.data, there.storage
        changes = {
            "name": "elastic",
            "workers": WorkersSpec(min=1, max=WORKERS + 1, initial=WORKERS),
            "autoscale": AutoscaleSpec(policy="available", cooldown_s=0.0),
        }
        with hosted_run(job_of(data, storage, quick).model_copy(update=changes)) as (hosts, live):
            live.until(lambda s: s.step > 20, "it trains")
            for number in range(rounds):
                index = hosts.add()
                joins.append(join(hosts, live, index))
                drains.append(drain(hosts, live, index))
                say(f"round {number + 1}: {joins[-1]}, {drains[-1]}")
            recoveries = live.status().recoveries
    uses, stalls = [j.use_s for j in joins], [j.stall_s for j in joins]
    offs = [d.off_s for d in drains]
    return Result(
        name="elasticity",
        seed=0,
        settings={
            "quick": quick,
            "model": QUICK_MODEL if quick else MODEL,
            "workers": WORKERS,
            "deadline_s": DEADLINE_S,
        },
        rounds=rounds,
        metrics={
            "ray_start_s": Spread.of([j.ray_start_s for j in joins]),
            "decide_s": Spread.of([j.decide_s for j in joins]),
            "warm_s": Spread.of([j.warm_s for j in joins]),
            "join_to_use_s": median_interval(uses),
            "join_stall_s": median_interval(stalls),
            "drain_off_s": Spread.of(offs),
            "drain_stall_s": median_interval([d.stall_s for d in drains]),
            "recoveries": len(recoveries),
        },
        bars=(
            at_most("join_to_use_s", 8.0, median_interval(uses)),
            at_most("join_stall_s", 0.5, median_interval(stalls)),
            equals("drain_steps_lost", 0, sum(d.steps_lost for d in drains)),
            at_most("drain_off_s_at_most", DEADLINE_S, max(offs)),
        ),
    )


def join(hosts: Hosts, live: HostedRun, index: int) -> Join:
    """A host joins the cluster, and is waited for until it has done a step."""
    known = len(live.status().rescales)
    started = time.time()
    hosts.join(index)
    joined = time.time()
    rescale = _settled(live, known, WORKERS + 1)
    times = {
        e["kind"]: e["time"]
        for e in read_events(objects_at(live.run_dir))
        if e["kind"] in ("target", "generation_planned")
    }
    return Join(
        ray_start_s=joined - started,
        decide_s=times["target"] - joined,
        warm_s=times["generation_planned"] - times["target"],
        use_s=_vote_time(live, rescale.step + 1) - joined,
        stall_s=float(rescale.stall_s or 0.0),
    )


def drain(hosts: Hosts, live: HostedRun, index: int) -> Drain:
    """A host is to be gone, and is, once the run has left it."""
    known, before = len(live.status().rescales), len(live.status().recoveries)
    noticed = hosts.drain(index, DEADLINE_S) - DEADLINE_S

    def is_left() -> bool:
        return not any(_name(process).startswith("ray::worker") for process in hosts.processes(index))

    until(is_left, PATIENCE_S, f"the run to leave host {index}")
    off_s = time.time() - noticed
    hosts.kill_host(index)
    rescale = _settled(live, known, WORKERS)
    recoveries = live.status().recoveries[before:]
    lost = rescale.steps_lost + sum(r.steps_lost + r.steps_replayed for r in recoveries)
    return Drain(off_s, float(rescale.stall_s or 0.0), lost)


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
        return str(process.name())
    return ""


def _settled(live: HostedRun, known: int, size: int) -> Rescale:
    """The first rescale after `known` ones, once it led to this size and its stall is known."""
    status = live.until(
        lambda s: len(s.rescales) > known and s.workers_now == size and s.rescales[-1].stall_s is not None,
        f"it has {size} workers",
    )
    return status.rescales[known]


def _vote_time(live: HostedRun, step: int) -> float:
    return next(record.timing.vote_time for record in RunFiles(live.run_dir).steps() if record.step == step)


if __name__ == "__main__":
    run(__doc__, measure)
