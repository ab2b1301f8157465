"""What a change of the world size costs, on the product's own path, beside Ray Train's elastic trainer.

    python -m benchmarks.rescale [--quick]

1. A run on a local cluster goes 2 -> 4 -> 3 -> 1 -> 2 by `scale` requests, over and over, its standbys warm; then it is
   rebuilt 50 times more, while its first worker's memory is watched.
2. A run with the same seed stays at 2 workers: the losses that the first run's are compared with. It then grows to 3
   without a standby: how long a request takes if a worker has to be started for it.
3. `benchmarks.baselines.ray_train_elastic` grows from 1 to 2 workers with the same model.

Stalls and lost steps are taken from the votes that the first worker, who is in every generation, has on record, steps
done twice included. Bytes moved are what the collectives received; the least possible is counted from the placements
in the journal by `benchmarks.support.minimum`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import (
    ROOT,
    Bar,
    Interval,
    Result,
    Spread,
    at_least,
    at_most,
    equals,
    median_interval,
    run,
    say,
    theil_sen,
)
from benchmarks.support.data import prepared_storage
from benchmarks.support.minimum import minimum_bytes
from benchmarks.support.product import LiveRun, Product, Request
from orchestrator.data.store import TokenStore
from orchestrator.model.factory import catalogue
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec

CYCLE = (4, 3, 1, 2)
INITIAL, LARGEST = 2, 4
MAX_GAP = 1e-5
NEVER = 1_000_000  # a step that no run here comes to

MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 288,
}
BATCH = {"global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 64}
QUICK_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
QUICK_MODEL |= {"moe_intermediate_size": 32}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    compared_steps: int  # with the fixed world
    rebuilds: int
    cold_starts: int
    ray_train_rounds: int


FULL = Size(rounds=5, compared_steps=100, rebuilds=50, cold_starts=3, ray_train_rounds=3)
QUICK = Size(rounds=1, compared_steps=40, rebuilds=2, cold_starts=1, ray_train_rounds=0)


@dataclass(frozen=True)
class Elastic:
    """What the run that was scaled has shown."""

    requests: tuple[Request, ...]
    votes: tuple[StepRecord, ...]  # the first worker's, in the order in which they were taken
    plans: dict[int, GenerationPlan]
    losses: dict[int, float]
    rss_bytes: tuple[tuple[float, float], ...]  # (generations since the first rebuild, the first worker's memory)


@dataclass(frozen=True)
class Fixed:
    """What the run at a fixed size has shown, and how long a cold growth took afterwards."""

    losses: dict[int, float]
    cold_s: tuple[float, ...]


def measure(quick: bool) -> Result:
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="rescale-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, store, storage = there.data, there.store, there.storage
        with Product(workspace / "home", num_cpus=LARGEST + 2) as product:
            elastic = run_elastic(LiveRun(product.client, job_of("elastic", LARGEST, data, storage, quick)), size)
            fixed = run_fixed(LiveRun(product.client, job_of("fixed", INITIAL, data, storage, quick)), size)
        ray_train = run_ray_train(job_of("ray-train", INITIAL, data, storage, quick), store, workspace, size)
        return result_of(quick, size, store, elastic, fixed, ray_train)


def job_of(name: str, held: int, data: DataSpec, storage: Path, quick: bool) -> JobSpec:
    """A job that starts with 2 workers and never ends by itself.

    `held` workers exist all the time: a growth to that size is scheduled for a step that never comes, so those that
    are not needed now are kept warm, and none is started in the middle of a measurement.
    """
    schedule = [{"at_step": NEVER - 1, "workers": held}] if held > INITIAL else []
    return JobSpec.model_validate(
        {
            "name": name,
            "workers": {"min": 1, "max": LARGEST, "initial": INITIAL, "schedule": schedule},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": NEVER, "lr": 3e-4, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "storage": str(storage),
        }
    )


# -- runs ------------------------------------------------------------------------------------------------------------


def run_elastic(live: LiveRun, size: Size) -> Elastic:
    """Scale through all rounds, then rebuild, then end."""
    live.until(lambda s: s.workers_now + s.standbys == LARGEST and s.step > 1, "all workers are warm")
    first = live.first_member()
    requests = []
    for number in range(size.rounds):
        requests += [live.scale(workers) for workers in CYCLE]
        say(f"round {number + 1}: stalls " + ", ".join(f"{r.rescale.stall_s:.2f} s" for r in requests[-len(CYCLE) :]))
    live.until(lambda s: s.step >= size.compared_steps, f"step {size.compared_steps} is done")
    rss_bytes = [(0.0, float(live.report_of(first).process.rss_bytes))]
    for number in range(size.rebuilds // 2):  # memory is compared at the same world size
        for workers in (INITIAL + 1, INITIAL):
            live.scale(workers, measured=False)
        rss_bytes.append((2.0 * (number + 1), float(live.report_of(first).process.rss_bytes)))
    say(f"{size.rebuilds} rebuilds more")
    votes = live.report_of(first, after_step=-1).history.records
    live.stop()
    losses = {record.step: record.loss for record in read_steps(live.run_dir)}
    return Elastic(tuple(requests), votes, live.plans(), losses, tuple(rss_bytes))


def run_fixed(live: LiveRun, size: Size) -> Fixed:
    """Stay at 2 workers for the steps that are compared; then grow without a standby, as often as asked."""
    live.until(lambda s: s.step >= size.compared_steps, f"step {size.compared_steps} is done")
    first = live.first_member()
    cold_s = []
    for _ in range(size.cold_starts):
        request = live.scale(INITIAL + 1)
        cold_s.append(effect_time(live.report_of(first, after_step=-1).history.records, request) - request.asked_time)
        live.scale(INITIAL)
        live.until(lambda s: s.standbys == 0, "the third worker is let go")
    say("cold growths: " + ", ".join(f"{seconds:.1f} s" for seconds in cold_s))
    live.stop()
    losses = {record.step: record.loss for record in read_steps(live.run_dir) if record.world_size == INITIAL}
    return Fixed(losses, tuple(cold_s))


def run_ray_train(job: JobSpec, store: TokenStore, workspace: Path, size: Size) -> list[dict[str, float]]:
    """The baseline, in a process of its own."""
    if not size.ray_train_rounds:
        return []
    job_file = workspace / "ray-train.json"
    job_file.write_text(job.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "benchmarks.baselines.ray_train_elastic", str(job_file), str(store.directory)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}  # not those of our cluster
    done = subprocess.run(
        [*command, str(size.ray_train_rounds)], cwd=ROOT, env=clean, check=True, text=True, stdout=subprocess.PIPE
    )
    rounds: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["rounds"]
    say("Ray Train: stalls " + ", ".join(f"{r['stall_s']:.1f} s" for r in rounds))
    return rounds


# -- figures ---------------------------------------------------------------------------------------------------------


def transition_of(
    request: Request, votes: Sequence[StepRecord], plan: GenerationPlan, least_bytes: int
) -> dict[str, Any]:
    """One rescale, as the votes and the collectives tell of it."""
    first = next(n for n, vote in enumerate(votes) if vote.generation == plan.generation)
    before, after = votes[first - 1], votes[first]
    own_step_s = median(vote.timing.step_s for vote in votes if vote.generation == plan.generation)
    return {
        "from": before.world_size,
        "to": after.world_size,
        "stall_s": after.timing.vote_time - before.timing.vote_time - own_step_s,
        "bytes_moved": request.rescale.moved_bytes,
        "bytes_minimum": least_bytes,
        "steps_lost": abs(before.step + 1 - after.step),  # done again, or left out
        "state_identical": request.rescale.state_identical is True,
    }


def effect_time(votes: Sequence[StepRecord], request: Request) -> float:
    """When the first step of the wished-for world was finished."""
    return next(vote.timing.vote_time for vote in votes if vote.generation == request.rescale.generation)


def rel_gaps(losses: dict[int, float], reference: dict[int, float], steps: int) -> list[float]:
    """The relative difference of two runs' losses at each of the first steps. KeyError if one lacks a step."""
    return [abs(losses[step] / reference[step] - 1.0) for step in range(steps)]


def result_of(
    quick: bool, size: Size, store: TokenStore, elastic: Elastic, fixed: Fixed, ray_train: list[dict[str, float]]
) -> Result:
    model = job_of("count", INITIAL, DataSpec(), Path("."), quick).model
    params, buffers = catalogue(model, store.vocab_size)
    transitions = []
    for request in elastic.requests:
        plan = elastic.plans[request.rescale.generation]
        assert plan.source is not None
        sides = (plan.source.world, plan.source.placement, plan.world, plan.placement)
        least_bytes = minimum_bytes(params, sum(math.prod(shape) for _, shape in buffers), *sides)
        transitions.append(transition_of(request, elastic.votes, plan, least_bytes))
    warm_s = [
        effect_time(elastic.votes, request) - request.asked_time
        for request in elastic.requests
        if request.rescale.to_size > request.rescale.from_size
    ]
    stall = median_interval([transition["stall_s"] for transition in transitions])
    theirs_s = [r["stall_s"] for r in ray_train]
    losses = [loss for _, loss in sorted(elastic.losses.items())]
    gaps = rel_gaps(elastic.losses, fixed.losses, size.compared_steps)
    metrics: dict[str, Any] = {
        "params": sum(spec.numel for spec in params),
        "tokens_per_step": BATCH["global_batch_size"] * BATCH["sequence_length"],
        "step_s": Spread.of([vote.timing.step_s for vote in elastic.votes if vote.world_size == INITIAL]),
        "steps": len(losses),
        "loss_first": sum(losses[:5]) / len(losses[:5]),
        "loss_last": sum(losses[-5:]) / len(losses[-5:]),
        "transitions": transitions,
        "stall_median_s": stall,
        "request_to_effect_warm_s": Spread.of(warm_s),
        "request_to_effect_cold_s": Spread.of(fixed.cold_s),
        "rescales_in_compared_steps": sum(r.rescale.step + 1 < size.compared_steps for r in elastic.requests),
        "max_rel_loss_gap": max(gaps),
        "rel_loss_gap": Spread.of(gaps),
        # Where a route has flipped: a token whose two experts score the same to the last bit or so went to the other.
        "steps_over_the_gap": [step for step, gap in enumerate(gaps) if gap > MAX_GAP],
        "rss_growth_mb_per_generation": theil_sen(elastic.rss_bytes) / 1e6,
        "ray_train_stall_s": Spread.of(theirs_s) if theirs_s else None,
        "ray_train_steps_replayed": median(r["steps_replayed"] for r in ray_train) if ray_train else None,
        "ratio": ratio_of(theirs_s, stall) if theirs_s else None,
    }
    return Result(
        name="rescale",
        seed=0,
        settings={"quick": quick, "model": QUICK_MODEL if quick else MODEL, "cycle": [INITIAL, *CYCLE]} | vars(size),
        rounds=size.rounds,
        metrics=metrics,
        baselines={"ray_train": ray_train},
        bars=bars_of(metrics),
    )


def ratio_of(theirs_s: Sequence[float], ours: Interval) -> Interval:
    """Their stall over ours, with every stall of theirs over every bound of ours inside the interval."""
    return Interval(median(theirs_s) / ours.median, min(theirs_s) / ours.high, max(theirs_s) / ours.low)


def bars_of(metrics: dict[str, Any]) -> tuple[Bar, ...]:
    transitions = metrics["transitions"]
    moved = max(t["bytes_moved"] / t["bytes_minimum"] for t in transitions)
    ratio = metrics["ratio"]
    return (
        equals("loss_falls", True, metrics["loss_last"] < metrics["loss_first"]),
        equals("steps_lost", 0, sum(t["steps_lost"] for t in transitions)),
        equals("state_identical", True, all(t["state_identical"] for t in transitions)),
        at_most("stall_median_s", 0.5, metrics["stall_median_s"]),
        at_least("ratio", 12, ratio) if ratio is not None else Bar("ratio", ">= 12", None, False),
        at_most("max_rel_loss_gap", MAX_GAP, metrics["max_rel_loss_gap"]),
        Bar("bytes_moved", "<= 1.05 x bytes_minimum", moved, moved <= 1.05),
        at_most("rss_growth_mb_per_generation", 1.0, metrics["rss_growth_mb_per_generation"]),
    )


if __name__ == "__main__":
    run(__doc__, measure)
