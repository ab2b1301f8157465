"""What changes of the number of experts do to a run: 16 to 64 and back.

    python -m benchmarks.experts [--quick]

A small model is trained on Python's library by the product on Ray in exact mode, each run with one worker of one
thread, two runs at a time, 1,024 tokens a step, two experts per token, three seeds. Runs of a seed see the same rows at
the same steps:

- `16`, `64`: so many experts from the first step to the last.
- `grown`: 16, and 64 from a third of the steps on, with the same function at first.
- `grown, dissolved`: the same, whose families of clones are dissolved after two thirds.
- `grown, half drawn anew`: the same growth by Drop-Upcycling with a ratio of 0.5, and noise on the routers, without
  which tokens visit the clones that aren't changed at first. The function is another one.
- `reap`, `load`, `random`: `grown` until two thirds, then the 16 that stay by that criterion.

Each token visits two experts in every arm, so equal steps are equal computation but for the routers.

- `jump`: the loss of the first step with other experts over that of the arm that goes on as it was, less one.
- `steps_to_recover`: steps after a shrink until the mean loss of 20 steps is that of the 20 before it, or less.
- `behind`: the last validation loss over that of another arm with the same seed, less one.

The first growth is done once more in fast mode.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.harness import Bar, Interval, Result, at_most, equals, mean_interval, run, say
from benchmarks.support.data import Prepared, prepared_storage
from benchmarks.support.product import Product
from orchestrator.client import OrchestratorClient
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.job import JobSpec

FEW, MANY = 16, 64
SEEDS, QUICK_SEEDS = 3, 1
WINDOW = 20  # steps whose losses are averaged
ROWS, LENGTH = 8, 128
PATIENCE_S = 3600.0
AT_ONCE = 2
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
SHRUNK = ("reap", "load", "random")


@dataclass(frozen=True)
class Steps:
    """When things happen, in steps."""

    grown: int = 120
    shrunk: int = 240
    last: int = 360


QUICK = Steps(grown=8, shrunk=72, last=96)  # a shrink by measurement needs 64 steps before it
FAST = Steps(grown=40, shrunk=40, last=44)


@dataclass(frozen=True)
class Arm:
    """A kind of run: experts at the start, and the changes."""

    num_experts: int
    schedule: tuple[dict[str, Any], ...] = ()
    determinism: str = "exact"  # which has one thread


def arms_of(at: Steps) -> dict[str, Arm]:
    growth = {"at_step": at.grown, "num_experts": MANY}
    shrink = {"at_step": at.shrunk, "num_experts": FEW}
    return {
        "16": Arm(FEW),
        "64": Arm(MANY),
        "grown": Arm(FEW, (growth,)),
        "grown, dissolved": Arm(FEW, (growth, {"at_step": at.shrunk, "num_experts": MANY, "dissolve": True})),
        "grown, half drawn anew": Arm(FEW, ({**growth, "noise": 0.3, "reinit_ratio": 0.5},)),
        **{keep: Arm(FEW, (growth, {**shrink, "keep": keep})) for keep in SHRUNK},
    }


def measure(quick: bool) -> Result:
    at, seeds = (QUICK, QUICK_SEEDS) if quick else (Steps(), SEEDS)
    fast = {
        "16": Arm(FEW, determinism="fast"),
        "grown": Arm(FEW, ({"at_step": FAST.grown, "num_experts": MANY},), "fast"),
    }
    with tempfile.TemporaryDirectory(prefix="experts-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        with Product(workspace / "home", num_cpus=AT_ONCE) as product:
            pair = _trained(product.client, fast, 0, FAST, there)
            runs = [_trained(product.client, arms_of(at), seed, at, there) for seed in range(seeds)]
    return _result(quick, at, runs, pair)


def _trained(
    client: OrchestratorClient, arms: dict[str, Arm], seed: int, at: Steps, there: Prepared
) -> dict[str, list[StepRecord]]:
    """The steps of a run of each arm."""

    def records_of(number: int, name: str) -> list[StepRecord]:
        job = job_of(arms[name], seed, at, there)
        run_id = client.submit(job, name=f"{arms[name].determinism}-{number}-{seed}")
        status = client.wait(run_id, timeout_s=PATIENCE_S)
        if status.phase is not RunPhase.SUCCEEDED:
            raise RuntimeError(f"the run of {name} is {status.phase}: {status.error or status.why}")
        records = list(read_steps(there.storage / run_id))
        say(f"seed {seed}, {name}: validation loss {_last_loss(records):.4f}")
        return records

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(arms, pool.map(records_of, range(len(arms)), arms), strict=True))


def job_of(arm: Arm, seed: int, at: Steps, there: Prepared) -> JobSpec:
    batch = {"global_batch_size": ROWS, "micro_batch_size": ROWS, "sequence_length": LENGTH}
    return JobSpec.model_validate(
        {
            "name": "experts",
            "model": {**MODEL, "n_routed_experts": arm.num_experts},
            "train": {**batch, "max_steps": at.last, "lr": 3e-3, "seed": seed, "determinism": arm.determinism},
            "experts": {"schedule": arm.schedule},
            "eval": {"every": at.last, "rows": 512},
            "data": there.data.model_dump(mode="json", exclude_unset=True),
            "storage": str(there.storage),
            "workers": {"min": 1, "max": 1, "initial": 1},
            "protection": {"every": "none"},
        }
    )


# -- the result ------------------------------------------------------------------------------------------------------


def _result(
    quick: bool, at: Steps, runs: Sequence[dict[str, list[StepRecord]]], pair: dict[str, list[StepRecord]]
) -> Result:
    table: dict[str, Any] = {
        name: {
            "loss": [_last_loss(by_arm[name]) for by_arm in runs],
            "behind 64": _behind(runs, name, "64"),
            "step_ms": 1e3 * median(record.timing.step_s for record in runs[0][name][-WINDOW:]),
        }
        for name in runs[0]
    }
    for keep in SHRUNK:
        table[keep] |= {
            "jump": [_jump(by_arm, keep, "grown", at.shrunk) for by_arm in runs],
            "steps_to_recover": [steps_to_recover([r.loss for r in by_arm[keep]], at.shrunk) for by_arm in runs],
            "behind grown": _behind(runs, keep, "grown"),
            "behind random": _behind(runs, keep, "random"),
        }
    table["grown"]["MaxVio after the growth"] = {
        after: median(by_arm["grown"][at.grown + after].routing.experts.max_violation for by_arm in runs)
        for after in (0, 5, 15, 50)
    }
    jumps = {name: [_jump(by_arm, name, "16", at.grown) for by_arm in runs] for name in _grown(runs[0])}
    bars: tuple[Bar, ...] = (
        at_most("jump at growth, fast", 1e-5, abs(_jump(pair, "grown", "16", FAST.grown))),
        equals("losses that differ at growth, exact", 0, sum(jump != 0.0 for jump in jumps["grown"])),
    )
    return Result(
        name="experts",
        seed=0,
        settings={"quick": quick, "model": MODEL, "steps": vars(at), "tokens": ROWS * LENGTH, "threads": 1},
        rounds=len(runs),
        metrics={"arms": table, "jumps at growth": jumps},
        bars=bars,
    )


def _grown(by_arm: dict[str, list[StepRecord]]) -> list[str]:
    return [name for name in by_arm if name.startswith("grown")]


def _last_loss(records: Sequence[StepRecord]) -> float:
    return [record.validation_loss for record in records if record.validation_loss is not None][-1]


def _jump(by_arm: dict[str, list[StepRecord]], name: str, other: str, step: int) -> float:
    return by_arm[name][step].loss / by_arm[other][step].loss - 1.0


def _behind(runs: Sequence[dict[str, list[StepRecord]]], name: str, other: str) -> Interval | float:
    values = [_last_loss(by_arm[name]) / _last_loss(by_arm[other]) - 1.0 for by_arm in runs]
    return mean_interval(values) if len(values) > 1 else values[0]


def steps_to_recover(losses: Sequence[float], shrunk: int, window: int = WINDOW) -> int | None:
    """Steps from `shrunk` until the mean of the newest `window` losses is that of those before it, or less; None if the
    run ends before."""
    before = fmean(losses[shrunk - window : shrunk])
    ends = range(shrunk + window, len(losses) + 1)
    return next((end - shrunk for end in ends if fmean(losses[end - window : end]) <= before), None)


if __name__ == "__main__":
    run(__doc__, measure)
