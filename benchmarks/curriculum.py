"""What an order by difficulty saves: tokens until a model is as good as one that saw its text in random order.

    python -m benchmarks.curriculum [--quick]

The product's own worker trains a small model on Python's library, all arms with the same model, corpus, tuning, tokens
and, pair by pair, the same seed, in a world of one. `shuffled` has no curriculum. For each signal of difficulty there
is a curriculum, whose range opens by the square root of the step over the first half of the run (Platanis et al.,
2019), and its opposite, which opens from the difficult end. `curriculum/rows` has all of the text from the beginning,
in rows that grow from 32 over 64 to 128 tokens; a step has as many rows as ever, so the same tokens are more and
smaller steps at first. `shuffled/small` is its control: full rows, about as many steps, all of one size.

The target is fixed before any other arm is looked at: the mean validation loss that `shuffled` has at half of its
tokens. `tokens_saved` is one less the tokens that an arm takes to get there over those of `shuffled` with the same
seed, both interpolated between validations; an arm that never gets there counts with all its tokens. `final_loss_gap`
is an arm's last validation loss over that of `shuffled`, less one. The bars are for the best signal's curriculum.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import Bar, Result, at_least, at_most, median_interval, run, say
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.environment import environment, worker_environment
from orchestrator.data.prepare.job_store import prepare
from orchestrator.spec.curriculum import SIGNALS
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from tests.support.worker_group import LocalWorkerGroup

SEEDS, QUICK_SEEDS = 5, 1
STEPS, QUICK_STEPS = 480, 24
VALIDATIONS, VALIDATION_ROWS = 24, 256
BATCH = {"global_batch_size": 16, "micro_batch_size": 8, "sequence_length": 128}
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
SHUFFLED, SMALL, ROWS = "shuffled", "shuffled/small", "curriculum/rows"
SMALL_BATCH = 10  # rows
ROW_STAGES = ((32, 0.15), (64, 0.25), (128, 0.6))  # tokens of a row, share of the run's tokens
AT_ONCE = 2  # runs side by side: losses don't depend on time

Curve = list[tuple[int, float]]  # tokens trained on, validation loss


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    signals = SIGNALS[:1] if quick else SIGNALS
    arms = [SHUFFLED, SMALL, ROWS, *(f"{order}/{signal}" for signal in signals for order in ("curriculum", "anti"))]
    return compared(quick, arms, seeds, steps)


def compared(quick: bool, arms: list[str], seeds: int, steps: int) -> Result:
    """The arms against `shuffled`, which is one of them."""
    signals = {signal_of(arm) for arm in arms} - {None}
    with tempfile.TemporaryDirectory(prefix="curriculum-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        stores = {signal: _store(data, stores_dir(quick, workspace), signal) for signal in {None, *signals}}
        runs = [(arm, seed) for seed in range(seeds) for arm in arms]

        def trained(which: tuple[str, int]) -> Curve:
            arm, seed = which
            curve = train(_job(arm, seed, steps, data, quick), stores[signal_of(arm)], workspace / f"{seed}-{arm}")
            say(f"seed {seed}, {arm}: {curve[-1][1]:.4f} after {curve[-1][0]} tokens")
            return curve

        with environment(worker_environment(threads=1, keep_memory=True)), ThreadPoolExecutor(AT_ONCE) as pool:
            curves = dict(zip(runs, pool.map(trained, runs), strict=True))
    by_arm = {arm: [curves[arm, seed] for seed in range(seeds)] for arm in arms}
    return _result(quick, seeds, steps, by_arm)


def signal_of(arm: str) -> str | None:
    """What the arm's store is scored by; None for any."""
    if arm == ROWS:
        return "length"
    return None if arm.startswith(SHUFFLED) else arm.partition("/")[2]


def train(job: JobSpec, store: Path, run_dir: Path) -> Curve:
    """Validation losses of a run from beginning to end."""
    run_dir.mkdir(parents=True)
    with LocalWorkerGroup(job, store, run_dir, size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished(patience_s=3600.0)
    rows, curve = job.train.global_batch_size, list[tuple[int, float]]()
    tokens = 0
    for _, record in sorted(worker_group.records.items()):
        tokens += rows * record.batch.sequence_length
        if record.validation_loss is not None:
            curve.append((tokens, record.validation_loss))
    return curve


def tokens_until(curve: Curve, loss: float) -> float:
    """Tokens until a validation loss is reached for the first time, between validations in a straight line."""
    for (tokens, above), (later, below) in pairwise(curve):
        if below <= loss:
            return tokens if above <= loss else tokens + (later - tokens) * (above - loss) / (above - below)
    return float(curve[-1][0])


def loss_at(curve: Curve, tokens: float) -> float:
    """The validation loss after so many tokens, between validations in a straight line."""
    for (before, above), (later, below) in pairwise(curve):
        if before <= tokens <= later:
            return above + (below - above) * (tokens - before) / (later - before)
    return curve[-1][1]


def _result(quick: bool, seeds: int, steps: int, by_arm: dict[str, list[Curve]]) -> Result:
    plain = by_arm[SHUFFLED]
    target = mean(loss_at(curve, curve[-1][0] / 2) for curve in plain)
    table: dict[str, Any] = {}
    for arm, curves in by_arm.items():
        if arm == SHUFFLED:
            continue
        pairs = list(zip(curves, plain, strict=True))
        table[arm] = {
            "tokens_saved": median_interval([1 - tokens_until(c, target) / tokens_until(p, target) for c, p in pairs]),
            "final_loss_gap": median_interval([c[-1][1] / p[-1][1] - 1 for c, p in pairs]),
        }
    best = max((arm for arm in table if arm.startswith("curriculum")), key=lambda a: table[a]["tokens_saved"].median)
    bars: tuple[Bar, ...] = (
        at_least("tokens_saved", 0.15, table[best]["tokens_saved"]),
        at_most("final_loss_gap", 0.005, table[best]["final_loss_gap"]),
    )
    return Result(
        name="curriculum",
        seed=0,
        settings={"quick": quick, "model": MODEL, "train": BATCH, "steps": steps, "best": best},
        rounds=seeds,
        metrics={
            "target_loss": target,
            "final_loss": {arm: mean(curve[-1][1] for curve in curves) for arm, curves in by_arm.items()},
            "arms": table,
        },
        bars=bars,
    )


def _job(arm: str, seed: int, steps: int, data: DataSpec, quick: bool) -> JobSpec:
    train: dict[str, Any] = dict(BATCH)
    curriculum: dict[str, Any] | None = None
    if arm == SMALL:
        train |= {"global_batch_size": SMALL_BATCH, "micro_batch_size": SMALL_BATCH}
        steps = steps * BATCH["global_batch_size"] // SMALL_BATCH
    elif arm == ROWS:
        lasts = [round(steps * share * train["sequence_length"] / length) for length, share in ROW_STAGES]
        stages = [
            {"name": f"rows-{length}", "sequence_length": length, "until": {"steps": last}}
            for (length, _), last in zip(ROW_STAGES, lasts, strict=True)
        ]
        del stages[-1]["until"]
        curriculum, steps = {"signal": "length", "stages": stages}, sum(lasts)
    elif arm != SHUFFLED:
        start = 0.5 if quick else 0.1  # a small corpus has few difficulties
        pace = {"kind": "root", "start": start, "steps": steps // 2, "hardest_first": arm.startswith("anti")}
        curriculum = {"signal": signal_of(arm), "stages": [{"name": "all", "pace": pace}]}
    return JobSpec.model_validate(
        {
            "name": "curriculum",
            "model": MODEL,
            "train": {
                **train,
                "max_steps": steps,
                "seed": seed,
                "lr": 2e-3,
                "lr_scheduler": {"warmup_steps": steps // 12},
            },
            "eval": {"every": steps // VALIDATIONS, "rows": VALIDATION_ROWS},
            "data": data,
            "curriculum": curriculum,
            "protection": {"every": "none"},
        }
    )


def _store(data: DataSpec, directory: Path, signal: str | None) -> Path:
    return prepare(data.source, data.vocab_size, data.holdout, directory, difficulty=signal).directory


if __name__ == "__main__":
    run(__doc__, measure)
