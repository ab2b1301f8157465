"""Whether exact runs end with the same bits, and how long fast ones agree.

    python -m benchmarks.exact [--quick]

For both precisions and both ZeRO stages, runs of 1,000 steps of the same job on a local cluster: with 1, 2, 3, 4 and 6
workers to which nothing happens, and one that is scaled, loses workers and goes on elsewhere, over and over. Then two
fast runs, with 1 worker and with 3.

- `digests_equal`: at every checkpoint, one each 100 steps, all tensors of all runs have the same bits.
- `loss_differences`: steps in which a run's loss, its gradients' norm, or the digest of the state that it led to has
  another bit than the first run's.
- `events`: rescales, killed workers and resumes that the eventful run went through.
- `fast_first_difference_step`: the first step whose loss or norm isn't the same in the two fast runs.
"""

import hashlib
import tempfile
from itertools import count, cycle
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, Result, at_least, equals, run, say
from benchmarks.rescale import QUICK_MODEL
from benchmarks.support.data import prepared_storage
from benchmarks.support.product import LiveRun, Product
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.client import OrchestratorClient
from orchestrator.run_records.checkpoints.search import path_of
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.state.fingerprint import whole

MODEL = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
BATCH = {"global_batch_size": 6, "micro_batch_size": 1, "sequence_length": 32}
WORLDS, QUICK_WORLDS = (1, 2, 3, 4, 6), (1, 2)
KINDS = [(precision, stage) for precision in ("bf16", "fp32") for stage in (1, 2)]
STEPS, QUICK_STEPS = 1000, 300
CHECKPOINT_EVERY, QUICK_CHECKPOINT_EVERY = 100, 75
EVENTS, QUICK_EVENTS = 24, 4
SIZES = (1, 3, 4, 2)  # that the eventful run is scaled to, with a killed worker after every second one
PATIENCE_S = 3600.0

Checkpoints = dict[str, str]  # by name of step and tensor: a digest
Steps = list[tuple[Any, ...]]


def measure(quick: bool) -> Result:
    metrics: dict[str, Any] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory(prefix="exact-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, storage = there.data, there.storage
        with Product(workspace / "home", num_cpus=max(WORLDS)) as product:
            for precision, stage in KINDS[:1] if quick else KINDS:
                name = f"{precision}-{stage}"
                metrics[name], of_kind = compare(product.client, name, precision, stage, data, storage, quick)
                bars += of_kind
            fast = [
                steps_of(calm(product.client, job_of(f"fast-{size}", size, data, storage, quick, determinism="fast")))
                for size in (QUICK_WORLDS if quick else (1, 3))
            ]
        differing = (step for step, (one, other) in enumerate(zip(*fast, strict=True)) if one != other)
        metrics["fast_first_difference_step"] = next(differing, None)
    return Result(
        name="exact",
        seed=0,
        settings={"quick": quick, "model": QUICK_MODEL if quick else MODEL, **BATCH, "worlds": WORLDS},
        rounds=1,
        metrics=metrics,
        bars=tuple(bars),
    )


def compare(
    client: OrchestratorClient, name: str, precision: str, stage: int, data: DataSpec, storage: Path, quick: bool
) -> tuple[dict[str, Any], list[Bar]]:
    """All runs of one kind with the first of them."""
    kind = {"determinism": "exact", "precision": precision, "zero_stage": stage}
    found: dict[str, tuple[Steps, Checkpoints]] = {}
    for size in QUICK_WORLDS if quick else WORLDS:
        run_dir = calm(client, job_of(f"{name}-{size}", size, data, storage, quick, **kind))
        found[str(size)] = steps_of(run_dir), digests_of(run_dir, quick)
        say(f"{name}: {size} workers have ended")
    run_dir, events = eventful(client, job_of(f"{name}-eventful", None, data, storage, quick, **kind), quick)
    found["eventful"] = steps_of(run_dir), digests_of(run_dir, quick)
    (steps, digests), *others = found.values()
    differences = sum(one != other for their_steps, _ in others for one, other in zip(steps, their_steps, strict=True))
    equal = all(theirs == digests for _, theirs in others)
    say(f"{name}: digests equal {equal}, {differences} losses differ, {events} events")
    metrics = {"digests_equal": equal, "digests": len(digests), "loss_differences": differences, "events": events}
    bars = [
        equals(f"digests_equal_{name}", True, equal),
        equals(f"loss_differences_{name}", 0, differences),
        at_least(f"events_{name}", QUICK_EVENTS if quick else 20, events),
    ]
    return metrics, bars


def job_of(name: str, size: int | None, data: DataSpec, storage: Path, quick: bool, **train: Any) -> JobSpec:
    """`size`: of a world that stays as it is, and needs no snapshots; None for one that is scaled, and has standbys, to
    be quick about it."""
    workers = {"min": 1, "max": max(SIZES), "initial": 2, "standby": 2} if size is None else {"min": size, "max": size}
    steps, every = (QUICK_STEPS, QUICK_CHECKPOINT_EVERY) if quick else (STEPS, CHECKPOINT_EVERY)
    return JobSpec.model_validate(
        {
            "name": name,
            "workers": workers,
            "resources": {"cpus": 1},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": steps, "lr": 2e-3, **train},
            "data": data,
            "checkpoint": {"every": every},
            "protection": {"every": 1 if size is None else "none"},
            "storage": str(storage),
        }
    )


def calm(client: OrchestratorClient, job: JobSpec) -> Path:
    """A run to which nothing happens."""
    return Path(client.wait(client.submit(job), timeout_s=PATIENCE_S).run_dir)


def eventful(client: OrchestratorClient, job: JobSpec, quick: bool) -> tuple[Path, int]:
    """A run that is scaled and killed, and in its middle paused and resumed; and how often."""
    live = LiveRun(client, job)
    wanted, sizes = QUICK_EVENTS if quick else EVENTS, cycle(SIZES)
    apart = job.train.max_steps // (wanted + 2)
    for number in count():
        live.until(lambda s, due=apart * (number + 1): s.step >= due, "the next event is due")  # type: ignore[misc]
        if number == wanted:
            break
        if number == wanted // 2:
            client.pause(job.name)
            client.wait(job.name, timeout_s=PATIENCE_S)
            client.resume(job.name, workers=3)
            live.until(lambda s: s.workers_now == 3, "it has been resumed")
        elif number % 3 == 2:
            known = len(live.status().recoveries)
            client.kill_worker(job.name, number % 2)
            live.until(lambda s, known=known: len(s.recoveries) > known, "it has recovered")  # type: ignore[misc]
        else:
            live.scale(next(sizes), measured=False)
    return Path(client.wait(job.name, timeout_s=PATIENCE_S).run_dir), wanted


def steps_of(run_dir: Path) -> Steps:
    return [(r.loss, r.update.grad_norm, r.update.applied, whole(r.state.digests)) for r in read_steps(run_dir)]


def digests_of(run_dir: Path, quick: bool) -> Checkpoints:
    """Of the checkpoints that all runs have: a pause writes one more."""
    every = QUICK_CHECKPOINT_EVERY if quick else CHECKPOINT_EVERY
    found: Checkpoints = {}
    for record in RunFiles(run_dir).checkpoints():
        if (record.step + 1) % every:
            continue
        with CheckpointReader(path_of(run_dir, record)) as reader:
            for name, tensor in reader.manifest.tensors.items():
                values = reader.read(name, 0, tensor.numel)
                found[f"step {record.step}/{name}"] = hashlib.sha256(values.tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    run(__doc__, measure)
