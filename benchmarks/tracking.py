"""Metrics through an outage of MLflow, and what tracking costs a step. A real `mlflow server` on loopback, over sqlite.

    python -m benchmarks.tracking [--quick]

1. A run publishes 100,000 values while the server is killed for 60 s, and in the middle of that the run's tracker too.
   Its workers are simulated, so that there are so many steps; Scheduler, controller, journal and tracker are the
   product's. When the run has ended, the rows of MLflow's own table are counted by SQL and compared with what the
   journal says has happened.
2. Two real runs of the same job with 2 workers, which are all cores of a small machine, take turns: one is tracked,
   and the server runs beside it; in the other something that does nothing takes the tracker's place. Whoever is not
   measured is stopped by SIGSTOP, tracker and server included. Then the same with the server killed.

`ratio_…` is the tracked run's step time over the other's. `cpu_share_…` is the processor time of tracker and server
over that of all cores: what a step can lose to them where all cores are busy, free of the noise between blocks.
"""

import math
import os
import signal
import sqlite3
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Interval, Result, Spread, alternate, at_most, equals, median_interval, ratios, run, say
from benchmarks.support.arms import Arm
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.product import LiveRun, Product
from orchestrator.control.memory import read_steps
from orchestrator.control.parts import Parts
from orchestrator.spec.job import DataSpec, JobSpec
from orchestrator.tracking.server import MlflowServer
from tests.support.simulated_worker import simulated_parts

WORKERS = 2
NEVER = 1_000_000
MAX_RATIO = 1.01
ASK_EVERY_S = 0.5
MODEL = {"hidden_size": 128, "num_layers": 4, "num_experts": 8, "top_k": 2, "expert_intermediate_size": 192}
QUICK_MODEL = {"hidden_size": 32, "num_layers": 2, "num_experts": 4, "top_k": 2, "expert_intermediate_size": 32}
BATCH = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 128}
EVERY_STEP = ("train/loss", "train/lr", "train/tokens", "train/skipped", "train/grad_norm", "perf/step_s")
EVERY_STEP += ("perf/tokens_per_second", "elastic/world_size", "elastic/generation", "moe/max_violation")


@dataclass(frozen=True)
class Size:
    """How much is measured. A block is several times as long as the tracker lets values wait."""

    values: int
    outage_s: float
    rounds: int  # with the server, and as many without
    block_steps: int


FULL = Size(values=100_000, outage_s=60.0, rounds=20, block_steps=60)
QUICK = Size(values=3_000, outage_s=3.0, rounds=1, block_steps=20)


def measure(quick: bool) -> Result:
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="tracking-") as folder:
        workspace = Path(folder)
        storage = workspace / "runs"
        storage.mkdir()
        stores = stores_dir(quick, workspace)
        stores.mkdir(parents=True, exist_ok=True)
        (storage / ".data").symlink_to(stores)
        with Product(workspace / "home", num_cpus=2 * WORKERS + 2) as product:
            account = run_account(product, workspace, storage, size)
            cost = run_cost(product, workspace, storage, data_spec(quick, workspace), quick, size)
    bars = (
        equals("missing", 0, account["missing"]),
        equals("duplicates", 0, account["duplicates"]),
        at_most("ratio_with_server", MAX_RATIO, cost["ratio_with_server"]),
        at_most("ratio_in_outage", MAX_RATIO, cost["ratio_in_outage"]),
    )
    return Result(
        name="tracking",
        seed=0,
        settings={"quick": quick, "workers": WORKERS, "model": QUICK_MODEL if quick else MODEL} | vars(size),
        rounds=2 * size.rounds,
        metrics=account | cost,
        baselines={"off": "the same run with a tracker that does nothing"},
        bars=bars,
    )


# -- values through an outage ----------------------------------------------------------------------------------------


def run_account(product: Product, workspace: Path, storage: Path, size: Size) -> dict[str, Any]:
    """What MLflow has of a run that it was away from."""
    database = workspace / "account.db"
    server = MlflowServer(f"sqlite:///{database}", log=workspace / "server.log")
    steps = math.ceil(size.values / len(EVERY_STEP))
    job = JobSpec.model_validate(
        {
            "name": "account",
            "workers": 1,
            "resources": {"cpus": 0.5},
            "train": {"steps": steps},
            "tracking": {"uri": server.url},
            "storage": str(storage),
            "envs": {"SIM_STEP_S": f"{1.3 * size.outage_s / steps:.6f}"},
        }
    )
    live = LiveRun(product.client, job, parts=replace(simulated_parts(), tracker=Parts().tracker))
    live.until(lambda s: s.step > steps // 10 and bool(s.tracking_url), "MLflow has seen the run")
    tracker = live.pids()["tracker"]
    server.kill()
    away_s = time.monotonic()
    say("the server is killed")
    time.sleep(size.outage_s / 2)
    os.kill(tracker, signal.SIGKILL)
    time.sleep(size.outage_s / 2)
    with MlflowServer(f"sqlite:///{database}", port=server.port, log=workspace / "server.log"):
        outage_s = time.monotonic() - away_s
        say(f"the server is back after {outage_s:.0f} s")
        ended = live.wait()
        account = compare(live.run_dir, database)
    return account | {"outage_s": outage_s, "warning_at_the_end": ended.warning}


def compare(run_dir: Path, database: Path) -> dict[str, int]:
    """The rows of MLflow's table beside the steps of the journal."""
    wanted = set()
    for record in read_steps(run_dir):
        wanted |= {(name, record.step) for name in EVERY_STEP}
        wanted |= {("eval/loss", record.step)} if record.validation_loss is not None else set()
    store = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    rows = store.execute("SELECT key, step FROM metrics").fetchall()
    store.close()
    return {"values": len(wanted), "missing": len(wanted - set(rows)), "duplicates": len(rows) - len(set(rows))}


# -- the cost of a step ----------------------------------------------------------------------------------------------


class RunArm(Arm):
    """A whole run of the product, all of its processes held still while it isn't measured, and `beside` with it."""

    def __init__(self, live: LiveRun, server: MlflowServer | None) -> None:
        super().__init__()
        self._live, self._server = live, server
        processes = live.pids()
        self._own, self._tracker = list(processes.values()), processes["tracker"]
        self.cpu_shares: list[float] = []
        self._first = live.first_member()
        self._newest = -1

    @property
    def pids(self) -> list[int]:
        if self._server is None or self._server.process.poll() is not None:
            return self._own
        server = psutil.Process(self._server.process.pid)
        return [*self._own, server.pid, *(child.pid for child in server.children(recursive=True))]

    def tracking_cpu_s(self) -> float:
        """Processor time that tracker and server have used so far."""
        spent = [psutil.Process(pid).cpu_times() for pid in [self._tracker, *self.pids[len(self._own) :]]]
        return float(sum(times.user + times.system for times in spent))

    def close(self) -> None:
        self.resume()
        self._live.cancel()

    def step_s(self, steps: int) -> float:
        """Run for so many steps, or some more, and pause. Returns the mean time between their votes."""
        began_time, began_cpu_s = time.time(), self.tracking_cpu_s()
        self.resume()
        votes: list[float] = []
        while len(votes) <= steps:
            time.sleep(ASK_EVERY_S)
            for record in self._live.report_of(self._first, after_step=self._newest).records:
                self._newest = record.step
                if record.vote_time - record.step_s > began_time:  # it was begun after the resumption
                    votes.append(record.vote_time)
        self.pause()
        wall_s = time.time() - began_time
        self.cpu_shares.append((self.tracking_cpu_s() - began_cpu_s) / wall_s / (os.cpu_count() or 1))
        return (votes[-1] - votes[0]) / (len(votes) - 1)


def run_cost(
    product: Product, workspace: Path, storage: Path, data: DataSpec, quick: bool, size: Size
) -> dict[str, Any]:
    server = MlflowServer(f"sqlite:///{workspace / 'cost.db'}", log=workspace / "server.log")
    arms: dict[str, RunArm] = {}
    try:
        for name, parts in (("on", Parts()), ("off", Parts(tracker="benchmarks.support.no_tracker:NoTracker"))):
            job = job_of(name, data, storage, server.url, quick)
            live = LiveRun(product.client, job, parts=parts)
            live.until(lambda s: s.step > 3 and (bool(s.tracking_url) or s.run_id == "off"), f"run {name} trains")
            arms[name] = RunArm(live, server if name == "on" else None)
            arms[name].pause()
        metrics = turns(arms, size, "with_server")
        server.kill()
        say("the server is killed")
        metrics |= turns(arms, size, "in_outage")
        return metrics
    finally:
        server.kill()
        for arm in arms.values():
            arm.close()


def turns(arms: dict[str, RunArm], size: Size, when: str) -> dict[str, Any]:
    arms["on"].cpu_shares.clear()
    measured = alternate(
        {name: lambda arm=arm: arm.step_s(size.block_steps) for name, arm in arms.items()}, size.rounds
    )
    ratio: Interval = median_interval(ratios(measured["on"], measured["off"]))
    say(f"{when}: ratio {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    times = {f"step_s_{name}_{when}": Spread.of(blocks) for name, blocks in measured.items()}
    return {f"ratio_{when}": ratio, f"cpu_share_{when}": Spread.of(arms["on"].cpu_shares)} | times


def job_of(name: str, data: DataSpec, storage: Path, uri: str, quick: bool) -> JobSpec:
    """A job that never ends by itself."""
    return JobSpec.model_validate(
        {
            "name": name,
            "workers": WORKERS,
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "steps": NEVER, "lr": 1e-3, "schedule": {"kind": "constant"}},
            "data": data,
            "tracking": {"uri": uri},
            "storage": str(storage),
        }
    )


if __name__ == "__main__":
    run(__doc__, measure)
