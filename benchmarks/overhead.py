"""Our training loop against a bare DeepSpeed loop: same model, rows and micro-batches, 2 workers, a short and a long
step.

    python -m benchmarks.overhead [--quick]

Ours is the whole of `orchestrator.worker`: the engine, the vote, records, and a parent that polls for reports as a
run's controller does. Not in it are Ray's own processes and the tracker's, which a run has besides. The other arm is
`benchmarks.baselines.bare_deepspeed`. Product defaults; both get the same malloc settings, the product's, and a third
arm tells what the bare loop does without them. All arms are alive at once and take turns (`benchmarks.support.arms`).
`ratio` is ours over bare in tokens per second; both train the same rows, so steps per second stand for it.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Result, Spread, alternate, at_least, median_interval, ratios, run, say
from benchmarks.support.arms import START_TIMEOUT_S, Arm, BareLoop, OurLoop
from benchmarks.support.data import data_spec, prepared, stores_dir
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

WANTED_RATIO = 0.97
WORLD_SIZE, THREADS = 2, 1
COMPARED_STEPS = 5

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
STEPS: dict[str, dict[str, int]] = {
    "short": {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 128},
    "long": {"global_batch_size": 80, "micro_batch_size": 4, "sequence_length": 128},
}
BLOCK_STEPS = {"short": 12, "long": 4}
ROUNDS = {"short": 36, "long": 16}  # a block of short steps is over in 3 s, and varies more


def measure(quick: bool) -> Result:
    metrics: dict[str, Any] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        store_dir = prepared(data, stores_dir(quick, workspace)).directory
        for name in ["short"] if quick else STEPS:
            job = job_of(name, data, quick)
            rounds, block_steps = (2, 3) if quick else (ROUNDS[name], BLOCK_STEPS[name])
            metrics[name], bar = compare(name, job, store_dir, workspace / name, rounds, block_steps, not quick)
            bars.append(bar)
    settings = {"quick": quick, "workers": WORLD_SIZE, "threads": THREADS, "model": QUICK_MODEL if quick else MODEL}
    return Result(
        name="overhead",
        seed=0,
        settings=settings | {"steps": STEPS, "block_steps": BLOCK_STEPS, "rounds": ROUNDS},
        rounds=2 if quick else sum(ROUNDS.values()),
        metrics=metrics,
        baselines={
            "bare": "benchmarks.baselines.bare_deepspeed",
            "bare_default_malloc": "the same, malloc as it comes",
        },
        bars=tuple(bars),
    )


def job_of(step: str, data: DataSpec, quick: bool) -> JobSpec:
    """Defaults but for sizes; it never ends by itself, and its learning rate is the bare loop's."""
    return JobSpec.model_validate(
        {
            "name": "overhead",
            "workers": WORLD_SIZE,
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**STEPS[step], "max_steps": 1_000_000, "lr": 1e-3, "lr_scheduler": {"kind": "constant"}},
            "data": data,
        }
    )


def compare(
    name: str, job: JobSpec, store_dir: Path, run_dir: Path, rounds: int, block_steps: int, with_default_malloc: bool
) -> tuple[dict[str, Any], Bar]:
    """Metrics of one length of step, and its bar."""
    tokens_per_step = job.train.global_batch_size * job.train.sequence_length
    with ExitStack() as alive:
        arms: dict[str, Arm] = {}

        def add(arm_name: str, arm: Arm) -> None:
            arms[arm_name] = alive.enter_context(arm)
            arm.run_block(COMPARED_STEPS, START_TIMEOUT_S)
            say(f"{name}: {arm_name} is warm")

        add("ours", OurLoop(job, store_dir, run_dir, WORLD_SIZE, THREADS))
        add("bare", BareLoop(job, store_dir, WORLD_SIZE, THREADS, keep_memory=True))
        if with_default_malloc:
            add("bare_default_malloc", BareLoop(job, store_dir, WORLD_SIZE, THREADS, keep_memory=False))
        speeds = alternate({key: lambda arm=arm: arm.run_block(block_steps) for key, arm in arms.items()}, rounds)  # type: ignore[misc]
        same = {key: arm.losses for key, arm in arms.items()}
    ratio = median_interval(ratios(speeds["ours"], speeds["bare"]))
    say(f"{name}: ratio {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    metrics: dict[str, Any] = {
        "tokens_per_step": tokens_per_step,
        "step_s": Spread.of([1 / speed for speed in speeds["ours"]]),
        "ratio": ratio,
        # Both train the same thing, or the comparison would mean nothing.
        "max_rel_loss_gap": max(abs(same["ours"][n] / same["bare"][n] - 1) for n in range(COMPARED_STEPS)),
    }
    if with_default_malloc:
        metrics["ratio_to_default_malloc"] = median_interval(ratios(speeds["ours"], speeds["bare_default_malloc"]))
    for key, values in speeds.items():
        metrics[f"{key}_tokens_per_s"] = Spread.of([value * tokens_per_step for value in values])
    return metrics, at_least(f"ratio_{name}", WANTED_RATIO, ratio)


if __name__ == "__main__":
    run(__doc__, measure)
