"""What exact training costs against fast training: time, gradient bytes, memory.

    python -m benchmarks.exact_cost [--quick]

The same job with `train.determinism` fast and exact, 16 M parameters, 1,024 tokens per micro-batch, in a world of 2 and
one of 3; both arms are alive at once and take turns (`benchmarks.support.arms`). With 3 workers on 2 cores ranks wait
for processors, in both arms alike.

- `overhead`: the time of an exact step over that of a fast one, less one.
- `cpu_overhead`: the same of the processors' time that all ranks together use per step, over all rounds. It doesn't
  tell who waited for whom, and is steadier.
- `gradient_bytes`: sent by all ranks in a step, exact over fast. `token_bytes` likewise: copies travel apart.
- `memory_mb`: resident, of the rank that has most, exact less fast.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Bar, Result, Spread, alternate, at_most, median_interval, ratios, run, say
from benchmarks.rescale import MODEL, QUICK_MODEL
from benchmarks.support.arms import START_TIMEOUT_S, OurLoop
from benchmarks.support.data import data_spec, prepared, stores_dir
from orchestrator.protocol.usage import TrafficKind
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

WORLDS = (2, 3)
SLOT = {"micro_batch_size": 4, "sequence_length": 256}
ROWS = {2: 16, 3: 24}  # two micro-batches for each rank
QUICK_SLOT = {"micro_batch_size": 2, "sequence_length": 32}
THREADS = 1
ROUNDS, BLOCK_STEPS = 40, 4
WARM_STEPS, QUICK_WARM_STEPS = 24, 4  # until workers have touched the memory that they keep for what may come
QUICK_ROUNDS = 2
TOKENS = (TrafficKind.DISPATCH, TrafficKind.COMBINE)


def measure(quick: bool) -> Result:
    metrics: dict[str, Any] = {}
    bars: list[Bar] = []
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="exact-cost-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        store_dir = prepared(data, stores_dir(quick, workspace)).directory
        for size in WORLDS[:1] if quick else WORLDS:
            metrics[f"{size}_workers"], of_size = compare(size, data, store_dir, workspace / str(size), rounds, quick)
            bars += of_size
    micro_batch = QUICK_SLOT if quick else SLOT
    return Result(
        name="exact_cost",
        seed=0,
        settings={
            "quick": quick,
            "threads": THREADS,
            "model": QUICK_MODEL if quick else MODEL,
            "rows": ROWS,
            **micro_batch,
        },
        rounds=rounds,
        metrics=metrics,
        bars=tuple(bars),
    )


def job_of(determinism: str, size: int, data: DataSpec, quick: bool) -> JobSpec:
    """Defaults but for sizes; it never ends by itself."""
    micro_batch = QUICK_SLOT if quick else SLOT
    train = {
        "max_steps": 1_000_000,
        "lr": 1e-3,
        "lr_scheduler": {"kind": "constant"},
        "global_batch_size": ROWS[size],
        **micro_batch,
    }
    return JobSpec.model_validate(
        {
            "name": determinism,
            "workers": size,
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**train, "determinism": determinism},
            "data": data,
        }
    )


def compare(
    size: int, data: DataSpec, store_dir: Path, directory: Path, rounds: int, quick: bool
) -> tuple[dict[str, Any], list[Bar]]:
    with ExitStack() as alive:
        arms: dict[str, OurLoop] = {}
        for name in ("fast", "exact"):
            job = job_of(name, size, data, quick)
            arms[name] = alive.enter_context(OurLoop(job, store_dir, directory / name, size, THREADS))
            arms[name].run_block(QUICK_WARM_STEPS if quick else WARM_STEPS, START_TIMEOUT_S)
            say(f"{size} workers: {name} is warm")
        before = {key: used(arm) for key, arm in arms.items()}
        speeds = alternate({key: lambda arm=arm: arm.run_block(BLOCK_STEPS) for key, arm in arms.items()}, rounds)  # type: ignore[misc]
        after = {key: used(arm) for key, arm in arms.items()}
        memory = {key: max(psutil.Process(pid).memory_info().rss for pid in arm.pids) for key, arm in arms.items()}
        sent = {key: arm.traffic for key, arm in arms.items()}
    cpu_s = {key: (after[key][0] - before[key][0]) / (after[key][1] - before[key][1]) for key in arms}
    slowdown = median_interval([ratio - 1.0 for ratio in ratios(speeds["fast"], speeds["exact"])])
    gradients = sent["exact"]["gradient"].payload / sent["fast"]["gradient"].payload
    tokens = {key: sum(traffic[kind.value].payload for kind in TOKENS) for key, traffic in sent.items()}
    say(f"{size} workers: overhead {slowdown.median:.3f} [{slowdown.low:.3f}, {slowdown.high:.3f}]")
    metrics = {
        "overhead": slowdown,
        "cpu_overhead": cpu_s["exact"] / cpu_s["fast"] - 1.0,
        "gradient_bytes": gradients,
        "token_bytes": tokens["exact"] / tokens["fast"],
        "memory_mb": (memory["exact"] - memory["fast"]) / 2**20,
        "memory_fast_mb": memory["fast"] / 2**20,
    } | {f"{key}_step_s": Spread.of([1 / speed for speed in values]) for key, values in speeds.items()}
    bars = [
        at_most(f"overhead_{size}", 0.15, slowdown),
        at_most(f"gradient_bytes_{size}", 2.0, gradients),
    ]
    return metrics, bars


def used(arm: OurLoop) -> tuple[float, int]:
    """The processors' time of all its ranks so far in seconds, and its steps."""
    times = [psutil.Process(pid).cpu_times() for pid in arm.pids]
    return sum(time.user + time.system for time in times), len(arm.losses)


if __name__ == "__main__":
    run(__doc__, measure)
