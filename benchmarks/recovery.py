"""What the loss of workers costs, on the product's own path, beside Ray Train and torchrun.

    python -m benchmarks.recovery [--quick]

A run with 4 workers, the model of `benchmarks.rescale`, on a local cluster. In each round a fault is made at a random
moment of a step, and the run goes back to 4 workers before the next one:

- `sigkill`, `sigkill_two`: one worker is killed, two that keep each other's snapshots are not.
- `sigstop`: one is frozen, so that it closes no connection and answers nothing.
- `kill_during_prepare`: a worker is killed while the world that shall replace its own is being connected.
- `controller_killed`: the run's controller is killed; training must not notice.
- `node_killed`, `link_down`: a worker's whole host ends, or is cut off the network. For these each worker has a host of
  its own, made of network namespaces, which takes Linux and root; elsewhere they are left out, and the line says why.

`stall_s` is on one clock for all: from right before the fault to the end of the first step that had never been
committed, less the median step of the new world. Steps and times come from the survivors' own record of their votes,
what was published from the journal.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT, Bar, Interval, Result, Spread, at_least, at_most, equals, median_interval, run, say
from benchmarks.rescale import BATCH, MODEL, NEVER, QUICK_MODEL, ratio_of
from benchmarks.support.data import prepared_storage
from benchmarks.support.host_losses import HOST_FAULTS, hosted_run
from benchmarks.support.losses import STEADY_STEPS, Fault, after_loss, full, once, typical_step_s, within_a_step
from benchmarks.support.product import LiveRun, Product
from orchestrator.data.store import TokenStore
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events
from tests.support.hosts import Hosts

WORKERS, QUICK_WORKERS = 4, 3
BASELINES = ("ray_train", "torchrun")
LIMITS = {"sigkill": 0.5, "sigkill_two": 1.5, "kill_during_prepare": 1.5, "node_killed": 1.5, "link_down": 5.0}


def measure(quick: bool) -> Result:
    rounds = 1 if quick else 5
    kinds = ("sigkill",) if quick else tuple(FAULTS)
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, store, storage = there.data, there.store, there.storage
        job = job_of(data, storage, quick)
        with Product(workspace / "home", num_cpus=WORKERS + 2) as product:
            live = LiveRun(product.client, job)
            found = in_turn({kind: partial(FAULTS[kind], live) for kind in kinds}, live, job, rounds)
            live.stop()
        if Hosts.available() is None:
            with hosted_run(job.model_copy(update={"name": "hosted"})) as (hosts, hosted):
                faults = {kind: partial(make, hosts, hosted) for kind, make in HOST_FAULTS.items()}
                found |= in_turn(faults, hosted, job, rounds)
        else:
            say(f"{', '.join(HOST_FAULTS)} are left out: {Hosts.available()}")
        theirs = {} if quick else {name: run_baseline(name, job, store, workspace, rounds) for name in BASELINES}
    return result_of(quick, rounds, found, theirs)


def in_turn(
    faults: Mapping[str, Callable[[random.Random], Fault]], live: LiveRun, job: JobSpec, rounds: int
) -> dict[str, list[Fault]]:
    """Make each fault once a round, always in a run that is whole again."""
    chance, found = random.Random(0), dict[str, list[Fault]]()
    for number in range(rounds):
        for kind, make in faults.items():
            full(live, job.workers.initial)
            fault = make(chance)
            found.setdefault(kind, []).append(fault)
            say(f"round {number + 1}, {kind}: {fault}")
    return found


def job_of(data: DataSpec, storage: Path, quick: bool) -> JobSpec:
    size = QUICK_WORKERS if quick else WORKERS
    return JobSpec.model_validate(
        {
            "name": "mortal",
            "workers": {"min": 1, "max": size + 1, "initial": size},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": NEVER, "lr": 3e-4, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "storage": str(storage),
        }
    )


# -- faults ----------------------------------------------------------------------------------------------------------


def at_some_moment(live: LiveRun, chance: random.Random, ranks: Sequence[int], by: signal.Signals) -> Fault:
    victims, strike = signalling(live, ranks, by)
    return after_loss(live, victims, strike, within_a_step(live, chance.random()))


def signalling(live: LiveRun, ranks: Sequence[int], by: signal.Signals) -> tuple[list[str], Callable[[], None]]:
    """The workers of these ranks, and what sends them the signal."""
    members, pids = live.members(), live.pids()
    victims = [members[rank] for rank in ranks]
    targets = [pids[f"worker/{victim}"] for victim in victims]

    def strike() -> None:
        for target in targets:
            os.kill(target, by)

    return victims, strike


def sigkill(live: LiveRun, chance: random.Random) -> Fault:
    return at_some_moment(live, chance, [1 + chance.randrange(len(live.members()) - 1)], signal.SIGKILL)


def sigkill_two(live: LiveRun, chance: random.Random) -> Fault:
    return at_some_moment(live, chance, [1, 3], signal.SIGKILL)  # of a ring of four


def sigstop(live: LiveRun, chance: random.Random) -> Fault:
    return at_some_moment(live, chance, [1 + chance.randrange(len(live.members()) - 1)], signal.SIGSTOP)


def kill_during_prepare(live: LiveRun, chance: random.Random) -> Fault:
    """A newcomer is warm and its world is planned; then a member dies."""
    planned = len([e for e in read_events(objects_at(live.run_dir)) if e["kind"] == "generation_planned"])
    size = len(live.members())
    live.ask_for(size + 1)

    def is_planned() -> bool:
        return len([e for e in read_events(objects_at(live.run_dir)) if e["kind"] == "generation_planned"]) > planned

    victims, strike = signalling(live, [2], signal.SIGKILL)
    fault = after_loss(live, victims, strike, once(is_planned))
    live.ask_for(size)
    return fault


def controller_killed(live: LiveRun, chance: random.Random) -> Fault:
    """Training goes on: the longest gap between two votes around the fault, less a step, is all that it may cost."""
    record_source, before = live.members()[0], live.status()
    time.sleep(chance.random() * typical_step_s(live, record_source))
    fault_time = time.time()
    os.kill(live.pids()["controller"], signal.SIGKILL)
    live.until_again(lambda s: s.step >= before.step + 3 * STEADY_STEPS, "its controller is back and publishes steps")
    votes = [
        v
        for v in live.report_of(record_source, after_step=-1).history.records
        if v.timing.vote_time > fault_time - 10.0
    ]
    steps = [b.timing.vote_time - a.timing.vote_time for a, b in pairwise(votes)]
    around = [b.timing.vote_time - a.timing.vote_time for a, b in pairwise(votes) if b.timing.vote_time > fault_time]
    published = [r["step"] for e in read_events(objects_at(live.run_dir)) if e["kind"] == "steps" for r in e["records"]]
    twice = len(published) - len(set(published))
    return Fault(max(0.0, max(around[:10]) - median(steps)), None, twice, 0, True, median(steps))


FAULTS: dict[str, Callable[[LiveRun, random.Random], Fault]] = {
    "sigkill": sigkill,
    "sigkill_two": sigkill_two,
    "sigstop": sigstop,
    "kill_during_prepare": kill_during_prepare,
    "controller_killed": controller_killed,
}


# -- baselines and figures -------------------------------------------------------------------------------------------


def run_baseline(name: str, job: JobSpec, store: TokenStore, workspace: Path, rounds: int) -> list[dict[str, float]]:
    """In a process of its own."""
    job_file = workspace / f"{name}.json"
    job_file.write_text(job.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", f"benchmarks.baselines.{name}_recovery", str(job_file), str(store.directory)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}  # not those of our cluster
    done = subprocess.run([*command, str(rounds)], cwd=ROOT, env=clean, check=True, text=True, stdout=subprocess.PIPE)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["rounds"]
    say(f"{name}: stalls " + ", ".join(f"{r['stall_s']:.1f} s" for r in found))
    return found


def result_of(
    quick: bool, rounds: int, found: dict[str, list[Fault]], theirs: dict[str, list[dict[str, float]]]
) -> Result:
    metrics: dict[str, Any] = {kind: summary_of(faults) for kind, faults in found.items()}
    for name, measured in theirs.items():
        metrics[name] = {
            "stall_s": Spread.of([r["stall_s"] for r in measured]),
            "steps_replayed": median(r["steps_replayed"] for r in measured),
        }
        metrics[f"ratio_{name}"] = ratio_of([r["stall_s"] for r in measured], metrics["sigkill"]["stall_median_s"])
    return Result(
        name="recovery",
        seed=0,
        settings={
            "quick": quick,
            "model": QUICK_MODEL if quick else MODEL,
            "workers": QUICK_WORKERS if quick else WORKERS,
            "faults": list(found),
            "left_out": {} if "node_killed" in found else dict.fromkeys(HOST_FAULTS, Hosts.available()),
        },
        rounds=rounds,
        metrics=metrics,
        baselines=theirs,
        bars=bars_of(metrics, found),
    )


def summary_of(faults: Sequence[Fault]) -> dict[str, Any]:
    detected = [fault.detect_s for fault in faults if fault.detect_s is not None]
    return {
        "stall_median_s": median_interval([fault.stall_s for fault in faults]),
        "detect_median_s": median(detected) if detected else None,
        "committed_steps_lost": sum(fault.committed_steps_lost for fault in faults),
        "steps_replayed": max(fault.steps_replayed for fault in faults),
        "state_identical": all(fault.state_identical for fault in faults),
        "step_s": median(fault.step_s for fault in faults),
    }


def bars_of(metrics: dict[str, Any], found: dict[str, list[Fault]]) -> tuple[Bar, ...]:
    bars = [
        equals("committed_steps_lost", 0, sum(metrics[kind]["committed_steps_lost"] for kind in found)),
        equals("state_identical", True, all(metrics[kind]["state_identical"] for kind in found)),
        at_most("steps_replayed", 1, max(metrics[kind]["steps_replayed"] for kind in found)),
    ]
    bars += [
        at_most(f"{kind}_stall_median_s", limit, metrics[kind]["stall_median_s"])
        for kind, limit in LIMITS.items()
        if kind in metrics
    ]
    for kind in HOST_FAULTS.keys() - metrics.keys():
        bars.append(Bar(f"{kind}_stall_median_s", f"<= {LIMITS[kind]:g}", None, False))
    if "sigstop" in metrics and "sigkill" in metrics:
        patience_s = max(3.0, 5.0 * metrics["sigstop"]["step_s"])
        limit = patience_s + metrics["sigkill"]["stall_median_s"].median
        bars.append(at_most("sigstop_stall_median_s", round(limit, 3), metrics["sigstop"]["stall_median_s"]))
    if "controller_killed" in metrics:  # no longer than the noise between two steps
        noise_s = 0.5 * metrics["controller_killed"]["step_s"]
        bars.append(
            at_most("controller_killed_stall", round(noise_s, 3), metrics["controller_killed"]["stall_median_s"])
        )
    for name, limit in (("ratio_ray_train", 12), ("ratio_torchrun", 6)):
        ratio: Interval | None = metrics.get(name)
        bars.append(at_least(name, limit, ratio) if ratio is not None else Bar(name, f">= {limit}", None, False))
    return tuple(bars)


if __name__ == "__main__":
    run(__doc__, measure)
