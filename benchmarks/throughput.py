"""Tokens per second of the whole product, beside its own engine and the plain loop that a user would write.

    python -m benchmarks.throughput [--quick]

Four arms take turns, each begun anew every round and measured over the same number of steps after a few:

- `one`: a run on Ray with one worker of two threads, tracking and snapshots on, as a user has it,
- `two`: the same with two workers of one thread,
- `engine`: `benchmarks.baselines.bare_engine`, one process of two threads,
- `transformers`: `benchmarks.baselines.plain_transformers`, the same, with transformers' own model.

All begin with the same weights and router biases: those of a run of 200 steps, which is trained once and kept beside
the prepared text. With `bf16`, all arms have masters and moments in fp32. An arm's memory is its proportional share
(PSS) at the end.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import ROOT, Bar, Interval, Result, Spread, at_least, median_interval, ratios, run, say
from benchmarks.support.data import stores_dir
from benchmarks.support.environment import environment, worker_environment
from benchmarks.support.memory import proportional_bytes
from benchmarks.support.product import LiveRun, Product
from orchestrator.checkpoint.exporting import export_hf
from orchestrator.control.memory import read_steps
from orchestrator.data.prepare import prepare
from orchestrator.data.store import TokenStore
from orchestrator.spec.job import DataSpec, JobSpec

ROUNDS, QUICK_ROUNDS = 6, 1
STEPS, QUICK_STEPS = 20, 3
BALANCED_STEPS, QUICK_BALANCED_STEPS = 200, 4
WARM_STEPS = 5
NEVER = 1_000_000
THREADS = 2

MODEL = {
    "hidden_size": 256,
    "num_layers": 6,
    "num_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 768,
    "num_experts": 16,
    "top_k": 2,
    "expert_intermediate_size": 256,
    "num_shared_experts": 1,
}
QUICK_MODEL = MODEL | {"hidden_size": 64, "num_layers": 2, "expert_intermediate_size": 32, "intermediate_size": 64}
BATCH = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 256}
DATA = DataSpec(source="builtin:stdlib", vocab_size=4096)
WANTED = {("one", "engine"): 0.95, ("two", "engine"): 0.92, ("one", "transformers"): 1.05, ("two", "transformers"): 1.0}


@dataclass(frozen=True)
class Measured:
    """One block of an arm.

    Args:
        memory_bytes: of all its training processes together.
    """

    tokens_per_s: float
    loss: float
    max_violation: float
    memory_bytes: int


def measure(quick: bool) -> Result:
    rounds, steps = (QUICK_ROUNDS, QUICK_STEPS) if quick else (ROUNDS, STEPS)
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        bench = Bench(Path(folder), quick, steps)
        found: dict[str, dict[str, list[Measured]]] = {}
        for precision in ("fp32",) if quick else ("bf16", "fp32"):
            arms: dict[str, Callable[[], Measured]] = {
                "one": lambda p=precision: bench.product(1, THREADS, p),  # type: ignore[misc]
                "two": lambda p=precision: bench.product(2, THREADS // 2, p),  # type: ignore[misc]
                "engine": lambda p=precision: bench.engine(p),  # type: ignore[misc]
                "transformers": lambda p=precision: bench.transformers(p),  # type: ignore[misc]
            }
            found[precision] = {name: [] for name in arms}
            for number in range(rounds):
                for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
                    measured = arms[name]()
                    found[precision][name].append(measured)
                    say(f"{precision} {name}: {measured}")
    return result_of(quick, rounds, steps, found)


class Bench:
    """What all arms begin with, and the arms."""

    def __init__(self, workspace: Path, quick: bool, steps: int) -> None:
        self._workspace, self._quick, self._steps = workspace, quick, steps
        self._stores = stores_dir(False, workspace)
        self._store: TokenStore = prepare(DATA.source, DATA.vocab_size, DATA.holdout, self._stores)
        self._storage = workspace / "runs"
        self._storage.mkdir()
        (self._storage / ".data").symlink_to(self._stores)
        self._count = 0
        self._weights = self._balanced()

    def product(self, workers: int, threads: int, precision: str) -> Measured:
        """A block of a run on Ray."""
        with Product(self._workspace / "home", num_cpus=workers * threads + 2) as product:
            live = LiveRun(product.client, self._job(precision, self._weights, workers, threads))
            last = WARM_STEPS + self._steps
            live.until(lambda status: status.step >= last, f"step {last} is done")
            records = [record for record in read_steps(live.run_dir) if WARM_STEPS <= record.step <= last]
            pids = [pid for name, pid in live.pids().items() if name.startswith("worker/")]
            memory = sum(proportional_bytes(pid) for pid in pids)
            live.cancel()
        tokens = sum(record.tokens for record in records[1:])
        return Measured(
            tokens / (records[-1].vote_time - records[0].vote_time),
            records[-1].loss,
            records[-1].experts.max_violation,
            memory,
        )

    def engine(self, precision: str) -> Measured:
        job = self._job_file(precision)
        return self._block("bare_engine", job, self._store.directory)

    def transformers(self, precision: str) -> Measured:
        return self._block("plain_transformers", self._weights, self._store.directory, self._job_file(precision))

    def _block(self, baseline: str, *arguments: Path) -> Measured:
        command = [sys.executable, "-m", f"benchmarks.baselines.{baseline}", *map(str, arguments), str(self._steps)]
        with environment(worker_environment(THREADS, keep_memory=True)):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        reported = json.loads(done.stdout.splitlines()[-1])
        return Measured(
            reported["tokens_per_s"], reported["loss"], reported["max_violation"], reported["proportional_bytes"]
        )

    def _job_file(self, precision: str) -> Path:
        path = self._workspace / f"{precision}.json"
        path.write_text(self._job(precision, self._weights).model_dump_json())
        return path

    def _job(self, precision: str, weights: Path | None, workers: int = 1, threads: int = THREADS) -> JobSpec:
        self._count += 1
        model = QUICK_MODEL if self._quick else MODEL
        batch = BATCH | ({"sequence_length": 64} if self._quick else {})
        schedule = {"lr": 1e-3, "schedule": {"kind": "constant"}}
        return JobSpec.model_validate(
            {
                "name": f"throughput-{self._count}",
                "workers": workers,
                "resources": {"cpus": threads},
                "model": model | ({} if weights is None else {"init_from": str(weights)}),
                "train": {**batch, **schedule, "steps": NEVER, "precision": precision},
                "data": DATA.model_dump(),
                "storage": str(self._storage),
            }
        )

    def _balanced(self) -> Path:
        """Directory of the weights that all arms begin with; trained unless it is there."""
        steps = QUICK_BALANCED_STEPS if self._quick else BALANCED_STEPS
        of = hashlib.sha256(f"{MODEL} {BATCH} {DATA} {steps}".encode()).hexdigest()[:12]
        directory = self._workspace / "weights" if self._quick else self._stores / f"throughput-{of}"
        if directory.exists():
            return directory
        job = self._job("fp32", None)
        job = job.model_copy(update={"train": job.train.model_copy(update={"steps": steps})})
        with Product(self._workspace / "home", num_cpus=THREADS + 2) as product:
            run_id = product.client.submit(job)
            status = product.client.wait(run_id)
            run_dir = Path(status.run_dir)
        checkpoint = max((run_dir / "checkpoints").glob("step-*"))
        say(f"{run_dir}: {status.phase}, weights of {checkpoint.name}")
        export_hf(checkpoint, job, run_dir / "tokenizer.json", directory, "fp32")
        return directory


def result_of(quick: bool, rounds: int, steps: int, found: dict[str, dict[str, list[Measured]]]) -> Result:
    metrics: dict[str, Any] = {}
    bars: list[Bar] = []
    for precision, arms in found.items():
        speeds = {name: [m.tokens_per_s for m in blocks] for name, blocks in arms.items()}
        of_pairs: dict[tuple[str, str], Interval] = {
            (ours, theirs): median_interval(ratios(speeds[ours], speeds[theirs])) for ours, theirs in WANTED
        }
        metrics[precision] = {
            "tokens_per_s": {name: Spread.of(values) for name, values in speeds.items()},
            "ratios": {f"{ours} over {theirs}": interval for (ours, theirs), interval in of_pairs.items()},
            "max_violation": {name: mean(m.max_violation for m in blocks) for name, blocks in arms.items()},
            "loss": {name: mean(m.loss for m in blocks) for name, blocks in arms.items()},
            "memory_bytes": {name: max(m.memory_bytes for m in blocks) for name, blocks in arms.items()},
        }
        if precision == "bf16" or quick:
            bars += [at_least(f"{a} over {b}", WANTED[a, b], interval) for (a, b), interval in of_pairs.items()]
    return Result(
        name="throughput",
        seed=0,
        settings={"quick": quick, "model": QUICK_MODEL if quick else MODEL, "batch": BATCH, "steps": steps},
        rounds=rounds,
        metrics=metrics,
        baselines={
            "engine": "benchmarks.baselines.bare_engine",
            "transformers": "benchmarks.baselines.plain_transformers",
        },
        bars=tuple(bars),
    )


if __name__ == "__main__":
    run(__doc__, measure)
