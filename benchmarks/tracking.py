"""Metrics through an outage of MLflow, and what tracking costs a step. A real `mlflow server` on loopback, over sqlite.

    python -m benchmarks.tracking [--quick]

1. A run publishes 100,000 values while the server is killed for 60 s, and in the middle of that the run's tracker too.
   Its workers are simulated, so that there are so many steps; Scheduler, controller, journal and tracker are the
   product's. When the run has ended, the rows of MLflow's own table are counted by SQL and compared with what the
   journal says has happened.
2. A real run with 2 workers, which are all cores of a small machine, goes on in blocks: with its tracker and the server
   at work, and with both held still by SIGSTOP, in turns. What waited is delivered before the next block, while nobody
   trains. Then the same with the server killed. It is one run, because two of the same job were seen to differ by some
   percent whatever they did. In both arms the controller hands values on, which is part of every run.

`ratio_…` is the step time with tracking over that without. `cpu_share_…` is the processor time of tracker and server
over that of all cores, the idle work of a Ray process included: free of the noise between blocks.
"""

import math
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Interval, Result, Spread, alternate, at_most, equals, median_interval, ratios, run, say
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.product import LiveRun, Product
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.tracking.mlflow_server import MlflowServer
from tests.support.simulated_services import simulated_parts

WORKERS = 2
NEVER = 1_000_000
MAX_RATIO = 1.01
ASK_EVERY_S = 0.5
MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
}
QUICK_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
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
        baselines={"off": "the same run while tracker and server are held still"},
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
            "train": {"max_steps": steps},
            "tracking": {"uri": server.url},
            "storage": str(storage),
            "envs": {"SIM_STEP_S": f"{1.3 * size.outage_s / steps:.6f}"},
        }
    )
    live = LiveRun(product.client, job, parts=replace(simulated_parts(), tracker=ActorClasses().tracker))
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


class TrackedRun:
    """A run whose processes can be held still; its tracker, and the server, also by themselves."""

    def __init__(self, live: LiveRun, server: MlflowServer) -> None:
        self._live, self._server = live, server
        processes = live.pids()
        self._tracker = processes.pop("tracker")
        self._training = list(processes.values())
        self._first = live.first_member()
        self._newest = -1
        self.cpu_shares: list[float] = []

    def on(self, steps: int) -> float:
        """Seconds per step while metrics are delivered."""
        self._signal(signal.SIGCONT, self._tracking)
        began_s, began_cpu_s = time.monotonic(), self._tracking_cpu_s()
        step_s = self._train(steps)
        cpu_s = self._tracking_cpu_s() - began_cpu_s
        self.cpu_shares.append(cpu_s / (time.monotonic() - began_s) / (os.cpu_count() or 1))
        self._signal(signal.SIGSTOP, self._tracking)
        return step_s

    def off(self, steps: int) -> float:
        """Seconds per step while nobody delivers. What has waited is delivered afterwards, when nobody trains."""
        step_s = self._train(steps)
        self._signal(signal.SIGCONT, self._tracking)
        while self._live.ask_tracker("describe")["waiting"] and self._is_served:
            time.sleep(ASK_EVERY_S)
        self._signal(signal.SIGSTOP, self._tracking)
        return step_s

    def pause(self) -> None:
        self._signal(signal.SIGSTOP, [*self._training, *self._tracking])

    def close(self) -> None:
        self._signal(signal.SIGCONT, [*self._training, *self._tracking])
        self._live.stop()

    def _train(self, steps: int) -> float:
        """For so many steps, or some more. Returns the mean time between their votes."""
        began_time = time.time()
        self._signal(signal.SIGCONT, self._training)
        votes: list[float] = []
        while len(votes) <= steps:
            time.sleep(ASK_EVERY_S)
            for record in self._live.report_of(self._first, after_step=self._newest).history.records:
                self._newest = record.step
                if record.timing.vote_time - record.timing.step_s > began_time:  # it was begun after the resumption
                    votes.append(record.timing.vote_time)
        self._signal(signal.SIGSTOP, self._training)
        return (votes[-1] - votes[0]) / (len(votes) - 1)

    @property
    def _is_served(self) -> bool:
        return self._server.process.poll() is None

    @property
    def _tracking(self) -> list[int]:
        """Tracker and server."""
        if not self._is_served:
            return [self._tracker]
        server = psutil.Process(self._server.process.pid)
        return [self._tracker, server.pid, *(child.pid for child in server.children(recursive=True))]

    def _tracking_cpu_s(self) -> float:
        spent = [psutil.Process(pid).cpu_times() for pid in self._tracking]
        return float(sum(times.user + times.system for times in spent))

    def _signal(self, number: signal.Signals, pids: Sequence[int]) -> None:
        for pid in pids:
            os.kill(pid, number)


def run_cost(
    product: Product, workspace: Path, storage: Path, data: DataSpec, quick: bool, size: Size
) -> dict[str, Any]:
    server = MlflowServer(f"sqlite:///{workspace / 'cost.db'}", log=workspace / "server.log")
    try:
        live = LiveRun(product.client, job_of("cost", data, storage, server.url, quick))
        live.until(lambda s: s.step > 10 and bool(s.tracking_url), "it trains and is tracked")
        tracked = TrackedRun(live, server)
        tracked.pause()
        try:
            metrics = turns(tracked, size, "with_server")
            server.kill()
            say("the server is killed")
            return metrics | turns(tracked, size, "in_outage")
        finally:
            tracked.close()
    finally:
        server.kill()


def turns(tracked: TrackedRun, size: Size, when: str) -> dict[str, Any]:
    tracked.cpu_shares.clear()
    steps = size.block_steps
    measured = alternate({"on": lambda: tracked.on(steps), "off": lambda: tracked.off(steps)}, size.rounds)
    ratio: Interval = median_interval(ratios(measured["on"], measured["off"]))
    say(f"{when}: ratio {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]")
    times = {f"step_s_{name}_{when}": Spread.of(blocks) for name, blocks in measured.items()}
    return {f"ratio_{when}": ratio, f"cpu_share_{when}": Spread.of(tracked.cpu_shares)} | times


def job_of(name: str, data: DataSpec, storage: Path, uri: str, quick: bool) -> JobSpec:
    """A job that never ends by itself."""
    return JobSpec.model_validate(
        {
            "name": name,
            "workers": WORKERS,
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": NEVER, "lr": 1e-3, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "tracking": {"uri": uri},
            "storage": str(storage),
        }
    )


if __name__ == "__main__":
    run(__doc__, measure)
