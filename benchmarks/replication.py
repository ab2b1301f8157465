"""What it costs a step that every worker's state is also in another worker's memory.

    python -m benchmarks.replication [--quick]

Two workers train the model of `benchmarks.rescale`, 17.7 M parameters, with 8,192 and with 1,024 tokens per step. Arms
are alive at once and take turns (`benchmarks.support.arms`): `off`, `every_step` and `auto`, with `protection.every`
none, 1 and auto, and for the short step `whole`, which is every_step with nothing but whole snapshots
(`recovery.whole_every: 1`). An arm's `overhead` is its time per step over that without snapshots, less one. A block of
steps has as many whole snapshots as its share.

Bytes are counted by the kernel, on the loopback device: those of an arm less those of the arm without snapshots are
what snapshots send, frames and acknowledgements included. They stand beside the bytes of a plain copy of both workers'
shards.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Result, Spread, alternate, at_most, median_interval, quantile, ratios, run, say
from benchmarks.rescale import MODEL, QUICK_MODEL
from benchmarks.support.arms import START_TIMEOUT_S, OurLoop
from benchmarks.support.data import data_spec, prepared, stores_dir
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import training_layout
from orchestrator.elastic.world import World
from orchestrator.model.factory import catalogue
from orchestrator.policy.health.snapshot_interval import MEASURED
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

WORLD_SIZE, THREADS = 2, 1
EVERY: dict[str, int | str] = {"off": "none", "every_step": 1, "auto": "auto", "whole": 1}  # protection.every of an arm
ARMS = tuple(EVERY)
# All four take turns too slowly where steps are long: an arm may stand still for a minute, then its collectives fail.
ARMS_OF = {"long": ARMS[:3], "short": ARMS}
LIMITS = {"every_step": 0.05, "auto": 0.03}
STEPS: dict[str, dict[str, int]] = {
    "long": {"global_batch_size": 64, "micro_batch_size": 4, "sequence_length": 128},
    "short": {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 128},
}
BLOCK_STEPS = {"long": 4, "short": 8}  # multiples of the steps between two whole snapshots
ROUNDS = {"long": 20, "short": 10}  # pairs of long steps differ by some percent
WARM_STEPS = MEASURED + 3  # then auto has chosen


def measure(quick: bool) -> Result:
    metrics: dict[str, Any] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="replication-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        store = prepared(data, stores_dir(quick, workspace))
        for name in ["short"] if quick else STEPS:
            jobs = {arm: job_of(name, arm, data, quick) for arm in ARMS_OF[name]}
            rounds, block_steps = (2, 4) if quick else (ROUNDS[name], BLOCK_STEPS[name])
            metrics[name] = compare(name, jobs, store.directory, workspace / name, rounds, block_steps)
            metrics[name] |= plain_bytes(jobs["off"], store.vocab_size)
            if name == "long":
                bars = [at_most(f"overhead_{arm}", LIMITS[arm], metrics[name]["overhead"][arm]) for arm in LIMITS]
    settings = {"quick": quick, "workers": WORLD_SIZE, "threads": THREADS, "model": QUICK_MODEL if quick else MODEL}
    return Result(
        name="replication",
        seed=0,
        settings=settings | {"steps": STEPS, "block_steps": BLOCK_STEPS},
        rounds=2 if quick else sum(ROUNDS.values()),
        metrics=metrics,
        bars=tuple(bars),
    )


def job_of(step: str, protection: str, data: DataSpec, quick: bool) -> JobSpec:
    """Defaults but for sizes and protection; it never ends by itself."""
    return JobSpec.model_validate(
        {
            "name": "replication",
            "workers": WORLD_SIZE,
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**STEPS[step], "max_steps": 1_000_000, "lr": 3e-4, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "protection": {"every": EVERY[protection]},
            "recovery": {"whole_every": 1} if protection == "whole" else {},
        }
    )


def compare(
    name: str, jobs: dict[str, JobSpec], store_dir: Path, run_dir: Path, rounds: int, block_steps: int
) -> dict[str, Any]:
    """Speed and bytes of all arms at one length of step."""
    with ExitStack() as alive:
        arms: dict[str, OurLoop] = {}
        for arm, job in jobs.items():
            arms[arm] = alive.enter_context(OurLoop(job, store_dir, run_dir / arm, WORLD_SIZE, THREADS))
            arms[arm].run_block(WARM_STEPS, START_TIMEOUT_S)
            say(f"{name}: {arm} is warm")
            for other in arms.values():  # nobody stands still for as long as its collectives may take
                other.run_block(1)
        sent: dict[str, list[float]] = {arm: [] for arm in arms}

        def block(arm: str) -> float:
            before, done = loopback_bytes(), len(arms[arm].losses)
            speed = arms[arm].run_block(block_steps)
            sent[arm].append((loopback_bytes() - before) / (len(arms[arm].losses) - done))
            return speed

        speeds = alternate({arm: lambda arm=arm: block(arm) for arm in arms}, rounds)  # type: ignore[misc]
        interval = arms["auto"].snapshot_interval
    overhead = {arm: median_interval([r - 1 for r in ratios(speeds["off"], speeds[arm])]) for arm in [*jobs][1:]}
    for arm, cost in overhead.items():
        say(f"{name}: {arm} costs {cost.median:.3f} [{cost.low:.3f}, {cost.high:.3f}] of a step")
    without = quantile(sent["off"], 0.5)
    return {
        "tokens_per_step": jobs["off"].train.global_batch_size * jobs["off"].train.sequence_length,
        "step_s": {arm: Spread.of([1 / speed for speed in values]) for arm, values in speeds.items()},
        "overhead": overhead,
        "snapshot_bytes_per_step": {arm: quantile(sent[arm], 0.5) - without for arm in [*jobs][1:]},
        "auto_interval": interval,
    }


def plain_bytes(job: JobSpec, vocab_size: int) -> dict[str, int]:
    """Bytes of both shards, and of what each rank alone has: the part that its buddy needs."""
    params, buffers = catalogue(job.model, vocab_size)
    world = World(0, tuple(f"w{rank}" for rank in range(WORLD_SIZE)))
    placement = ExpertPlacement.balanced(job.model.n_routed_experts, WORLD_SIZE)
    layout = training_layout(inventory(params, job, buffers), placement, world, job.communication)
    formats = [SnapshotFormat.of(layout, rank) for rank in range(WORLD_SIZE)]
    return {
        "state_bytes": sum(f.total_bytes for f in formats),
        "unique_bytes": sum(f.shared_bytes for f in formats),
        "num_parameters": sum(param.numel for param in params),
    }


def loopback_bytes() -> int:
    """Sent on the loopback device since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counters = line.partition(":")
        if device.strip() == "lo":
            return int(counters.split()[8])
    raise OSError("this machine has no loopback device")


if __name__ == "__main__":
    run(__doc__, measure)
