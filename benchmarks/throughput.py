"""Tokens per second of the whole product, beside its own engine and the plain loop that a user would write.

    python -m benchmarks.throughput [--quick]

Four arms take turns, a few steps each; the others are stopped meanwhile (`benchmarks.support.arms`):

- `one`: a run on Ray with one worker of two threads, tracking and snapshots on, as a user has it,
- `two`: the same with two workers of one thread,
- `engine`: `benchmarks.baselines.bare_engine`, one process of two threads,
- `transformers`: `benchmarks.baselines.plain_transformers`, the same, with transformers' own model.

All begin with the same weights and router biases: those of a run of 200 steps, which is trained once and kept beside
the prepared text. With `bf16` all arms have masters and moments in fp32, and a sixteenth of the tokens a step:
processors without instructions for bf16 take twenty times as long. `max_violation` is MaxVio of each arm's last step,
mean over layers: transformers' loop moves no router bias.
"""

import hashlib
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Interval, Result, Spread, alternate, at_least, median_interval, ratios, run, say
from benchmarks.support.arms import START_TIMEOUT_S, Arm, Loop, WholeProduct
from benchmarks.support.data import stores_dir
from benchmarks.support.environment import worker_environment
from benchmarks.support.product import Product
from orchestrator.checkpoint.hf.export import export_hf
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import TokenStore
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

NEVER = 1_000_000
THREADS = 2
WARM_STEPS = 3

MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
}
QUICK_MODEL = MODEL | {"hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
DATA = DataSpec(source="builtin:stdlib", vocab_size=4096)
WANTED = {("one", "engine"): 0.95, ("two", "engine"): 0.92, ("one", "transformers"): 1.05, ("two", "transformers"): 1.0}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    steps: int  # of a turn
    batch: dict[str, int]


BATCH = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 256}
BF16_BATCH = {"global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 128}
SIZES = {
    "fp32": Size(30, 2, BATCH),
    "bf16": Size(12, 2, BF16_BATCH),
}  # turns are short: none may be stopped for a minute
QUICK_SIZES = {"fp32": Size(2, 2, BATCH | {"sequence_length": 64})}
BALANCED_STEPS, QUICK_BALANCED_STEPS = 200, 4


def measure(quick: bool) -> Result:
    sizes = QUICK_SIZES if quick else SIZES
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        bench = Bench(Path(folder), quick)
        found = {precision: bench.compare(precision, size) for precision, size in sizes.items()}
    bars: list[Bar] = []
    for precision, figures in found.items():
        of_pairs: dict[str, Interval] = figures["ratios"]
        bars += [at_least(f"{p}, {precision}", w, of_pairs[p]) for p, w in zip(of_pairs, WANTED.values(), strict=True)]
    return Result(
        name="throughput",
        seed=0,
        settings={"quick": quick, "model": bench.model, "sizes": {key: vars(size) for key, size in sizes.items()}},
        rounds=sum(size.rounds for size in sizes.values()),
        metrics=found,
        baselines={
            "engine": "benchmarks.baselines.bare_engine",
            "transformers": "benchmarks.baselines.plain_transformers",
        },
        bars=tuple(bars),
    )


class Bench:
    """What all arms begin with, and their comparison."""

    def __init__(self, workspace: Path, quick: bool) -> None:
        self.model = QUICK_MODEL if quick else MODEL
        self._workspace, self._quick = workspace, quick
        self._stores = stores_dir(False, workspace)
        self._store: TokenStore = prepare(DATA.source, DATA.vocab_size, DATA.holdout, self._stores)
        self._storage = workspace / "runs"
        self._storage.mkdir()
        (self._storage / ".data").symlink_to(self._stores)
        self._weights = self._balanced()

    def compare(self, precision: str, size: Size) -> dict[str, Any]:
        """Metrics of all arms."""
        with ExitStack() as alive:
            arms: dict[str, Arm] = {}

            def add(name: str, arm: Arm) -> None:
                arms[name] = alive.enter_context(arm)
                arm.run_block(WARM_STEPS, START_TIMEOUT_S)
                for other in arms.values():
                    other.run_block(1)
                say(f"{precision}: {name} is warm")

            for name, workers, threads in (("one", 1, THREADS), ("two", THREADS, 1)):
                job = self.job(size.batch, precision, self._weights, workers, threads)
                add(name, WholeProduct(job, self._workspace / f"{precision}-{name}", workers * threads + 2))
            job_file = self._workspace / f"{precision}.json"
            job_file.write_text(self.job(size.batch, precision, self._weights).model_dump_json())
            variables = worker_environment(THREADS, keep_memory=True)
            for name, module in (("engine", "bare_engine"), ("transformers", "plain_transformers")):
                command = [f"benchmarks.baselines.{module}", str(job_file), str(self._store.directory), ""]
                add(name, Loop(command, 1, variables))
            tokens = size.batch["global_batch_size"] * size.batch["sequence_length"]
            turns = {name: lambda arm=arm: tokens * arm.run_block(size.steps) for name, arm in arms.items()}
            speeds = alternate(turns, size.rounds)
            violations = {name: last_violation(arm) for name, arm in arms.items()}
            first_losses = {name: arm.losses[0] for name, arm in arms.items()}  # of the same weights and rows
        of_pairs = {f"{a} over {b}": median_interval(ratios(speeds[a], speeds[b])) for a, b in WANTED}
        for pair, ratio in of_pairs.items():
            say(f"{precision}: {pair} {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
        return {
            "tokens_per_s": {name: Spread.of(values) for name, values in speeds.items()},
            "ratios": of_pairs,
            "max_violation": violations,
            "first_loss": first_losses,
        }

    def job(
        self, batch: dict[str, int], precision: str, weights: Path | None, workers: int = 1, threads: int = THREADS
    ) -> JobSpec:
        schedule = {"lr": 1e-3, "lr_scheduler": {"kind": "constant"}}
        return JobSpec.model_validate(
            {
                "name": f"{precision}-{workers}-workers" if weights else "balanced",
                "workers": workers,
                "resources": {"cpus": threads},
                "model": self.model | ({} if weights is None else {"init_from": str(weights)}),
                "train": {**batch, **schedule, "max_steps": NEVER, "precision": precision},
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
        job = self.job(BATCH, "fp32", None)
        job = job.model_copy(update={"train": job.train.model_copy(update={"max_steps": steps})})
        with Product(self._workspace / "home", num_cpus=THREADS + 2) as product:
            run_id = product.client.submit(job)
            status = product.client.wait(run_id)
            run_dir = Path(status.run_dir)
        checkpoint = Path(str(status.checkpoint))
        say(f"{run_dir}: {status.phase}, weights of {checkpoint.name}")
        export_hf(checkpoint, job, run_dir / "tokenizer.json", directory, "fp32")
        return directory


def last_violation(arm: Arm) -> float:
    if isinstance(arm, WholeProduct):
        return arm.records[max(arm.records)].routing.experts.max_violation
    assert isinstance(arm, Loop)
    return float(arm.last["max_violation"])


if __name__ == "__main__":
    run(__doc__, measure)
