"""The cost of a loss: a tuned dense model against a recipe of experts, growing rows, balance, compression and packing,
on the same corpus, and each part of the recipe taken out.

    python -m benchmarks.compute_to_target [--quick] [--results FILE]

Both sides are trained on Python's library by two of the product's workers of one thread each, without Ray, controller
and snapshots, one run at a time, for equal numbers of floating-point operations (`orchestrator.policy.estimate.flops`).
The dense model has packed rows, too. A token is multiplied by as many weights in either (`support/recipe.py`).

1. Rows of an update, learning rate and width are tuned for the dense model and for the recipe alike: from the same
   setting, one of the three is moved up or down its ladder while that lowers the first seed's held-out loss at half of
   `FLOPS`, until no move does. `sweep` shows what was tried, what it took, and what ended at the end of its ladder.
2. Both sides are trained in turn for a quarter, a half and all of `FLOPS`, with three seeds each, and with the first
   seed for four times `FLOPS`, which repeats the corpus.
3. The recipe without each of its parts is trained for a half of `FLOPS`, with the recipe's setting. A curriculum, which
   makes rows grow, lays pieces of documents back to back, while the dense model has rows of consecutive tokens. So
   without `growing rows` pieces remain, and `curriculum` takes both out.

- `flops_ratio`, `time_ratio`: what the dense model took for its loss at `FLOPS`, over what the recipe took for a loss
  3 % higher; in operations and in worker-seconds. Between two budgets the loss's logarithm is a straight line over that
  of the operations. Where the recipe's last budget did not reach it (`least`), the ratio is an upper bound, by that
  budget, and meets no bar; where its first one did (`most`), a lower bound. `dense at 3 % more loss` is the same of the
  dense model itself: what the allowance alone is worth.
- `parts`: what the recipe without a part took, over what the whole one took for the same loss.
- `behind`: the loss over that of the other side with the same seed and operations, less one.
- `choice`, `copy`: continuations told from others, and the worth of a copy of a text before it
  (`support/held_out.py`). Few-shot classification is not measured: nothing of this size does it.
- `worker_s`: the median step of each length of rows, times their number and workers.
- `modelled_energy_j`: `WATTS` in each worker-second and `JOULES_PER_BYTE` sent, both assumed; nothing here measures it.
  On one machine it is the time once more.

Results are kept in a file, a line per run with its settings and commit, and the benchmark goes on from there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import ROOT, Bar, Interval, Result, at_least, mean_interval, run, say
from benchmarks.support import held_out as measures
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.recipe import LENGTH, SIGNAL, Corpus, Recipe, Setting, job_of, size_of_model
from benchmarks.support.results_file import ResultsFile
from benchmarks.support.worker_runs import WorkerRun, finished_run
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.store import TokenStore
from orchestrator.inference.load_model import load_model
from orchestrator.policy.estimate.flops import ModelSize, flops_of
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.job import JobSpec

WORLD_SIZE = 2
FLOPS, QUICK_FLOPS = 2e12, 1e9
SHARES, LONGER = (0.25, 0.5, 1.0), 4.0
SWEPT = 0.5  # share at which settings are tuned, and parts taken out
SEEDS, QUICK_SEEDS = 3, 1
ALLOWED = 0.03  # more loss
HELD_OUT_ROWS, QUICK_ROWS = 512, 16
WATTS = 10.0  # of a busy core and its memory
JOULES_PER_BYTE = 1e-8  # of a network
SPENT = ("flops", "worker_s", "modelled_energy_j", "tokens")

START = Setting(rows=16, lr=8e-3, width=48)
LADDERS: Mapping[str, tuple[float, ...]] = {
    "rows": (4, 8, 16, 32, 64),
    "lr": (4e-3, 8e-3, 16e-3, 32e-3, 64e-3),
    "width": (24, 32, 48, 64),
}
QUICK_LADDERS: Mapping[str, tuple[float, ...]] = {"rows": (8, 16)}

DENSE = Recipe()
RECIPE = Recipe(num_experts=16, in_pieces=True, grows_rows=True, compresses=True)
WITHOUT = {
    "experts": replace(RECIPE, num_experts=1),
    "growing rows": replace(RECIPE, grows_rows=False),
    "curriculum": replace(RECIPE, grows_rows=False, in_pieces=False),
    "balance": replace(RECIPE, balances=False),
    "compression": replace(RECIPE, compresses=False),
    "packing": replace(RECIPE, packs=False),
}
QUICK_WITHOUT = {part: WITHOUT[part] for part in ("experts", "packing")}

Run = Mapping[str, Any]  # what a run has shown


class Runs:
    """Trained models and what they have shown, known or measured now."""

    def __init__(self, results: ResultsFile, store: TokenStore, corpus: Corpus, flops: float, num_rows: int) -> None:
        self._results, self._store, self._corpus = results, store, corpus
        self._flops, self._num_rows = flops, num_rows

    def of(self, recipe: Recipe, setting: Setting, seed: int, share: float) -> Run:
        """What a model has shown that was trained for this share of the operations."""
        job = job_of(recipe, setting, seed, share * self._flops, self._corpus)
        settings = {
            "recipe": asdict(recipe),
            "setting": asdict(setting),
            "seed": seed,
            "flops": share * self._flops,
            "job": job.model_dump(mode="json", by_alias=True),
            "world_size": WORLD_SIZE,
            "held out": [self._num_rows, measures.PROMPT, measures.CONTINUATION, measures.COPIED],
            "store": self._store.digest,
        }
        shown = self._results.of(settings, lambda: self._trained(job))
        say(f"{settings['recipe']}, {setting}, seed {seed}, {share:g}: {shown['loss']}, {shown['worker_s']:.0f} s")
        return shown

    def _trained(self, job: JobSpec) -> Run:
        with finished_run(job, self._store.directory, WORLD_SIZE) as done:
            model = load_model(done.checkpoint, job, self._store.vocab_size)
            return {**self._spent(job, done), **measures.held_out(model, self._store, LENGTH, self._num_rows)}

    def _spent(self, job: JobSpec, done: WorkerRun) -> Run:
        size = size_of_model(job, self._store.vocab_size)
        flops = flops_of(size, done.records)
        assert flops.attention is not None
        sent = sum(traffic.sent for record in done.records for traffic in record.communication.traffic.values())
        last = done.records[-len(done.records) // 5 :]
        return {
            "flops": flops.parameters + flops.attention,
            "worker_s": WORLD_SIZE * training_s(done.records),
            "tokens": sum(record.batch.tokens for record in done.records),
            "bytes_sent": sent,
            "parameters": size.parameters,
            "share_of_experts": experts_share(job, size),
            "training_loss": fmean(record.loss for record in last),
            "max_violation": fmean(record.routing.experts.max_violation for record in last),
            "skipped_updates": sum(not record.update.applied for record in done.records),
        }


def measure(quick: bool, results: str) -> Result:
    with TemporaryDirectory(prefix="compute-to-target-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        stores = stores_dir(quick, workspace)
        store = prepare(data.source, data.vocab_size, data.holdout, stores, difficulty=SIGNAL)
        corpus = Corpus(data, store.vocab_size, store.num_tokens("train") / store.num_pieces("train", LENGTH))
        kept = ResultsFile(workspace / "results.jsonl" if quick else ROOT / results)
        flops, num_rows = (QUICK_FLOPS, QUICK_ROWS) if quick else (FLOPS, HELD_OUT_ROWS)
        return _measured(quick, Runs(kept, store, corpus, flops, num_rows))


def _measured(quick: bool, runs: Runs) -> Result:
    seeds = QUICK_SEEDS if quick else SEEDS
    ladders = QUICK_LADDERS if quick else LADDERS
    sides = {"dense": DENSE, "recipe": RECIPE}
    tuned, sweep = dict[str, Setting](), dict[str, Any]()
    for name, recipe in sides.items():
        tried = tuned_settings(START, ladders, lambda s, recipe=recipe: _loss(runs.of(recipe, s, 0, SWEPT)))
        tuned[name] = min(tried, key=lambda setting: tried[setting])
        spent = [runs.of(recipe, setting, 0, SWEPT) for setting in tried]
        sweep[name] = {
            "tuned": asdict(tuned[name]),
            "at the end of": [k for k, ladder in ladders.items() if getattr(tuned[name], k) in (ladder[0], ladder[-1])],
            "flops": sum(each["flops"] for each in spent),
            "worker_s": sum(each["worker_s"] for each in spent),
            "tried": [
                {**asdict(setting), "loss": each["loss"], "worker_s": each["worker_s"]}
                for setting, each in zip(tried, spent, strict=True)
            ],
        }
        say(f"{name}: {tuned[name]} is the best of {len(tried)} settings")
    curves: dict[str, list[list[Run]]] = {name: [[] for _ in range(seeds)] for name in sides}
    for seed in range(seeds):
        for share in SHARES:
            for name, recipe in sides.items():
                curves[name][seed].append(runs.of(recipe, tuned[name], seed, share))
    without = QUICK_WITHOUT if quick else WITHOUT
    parts: dict[str, list[Run]] = {part: [] for part in without}
    for seed in range(seeds):
        for part, recipe in without.items():
            parts[part].append(runs.of(recipe, tuned["recipe"], seed, SWEPT))
    longer = {} if quick else {name: runs.of(recipe, tuned[name], 0, LONGER) for name, recipe in sides.items()}
    return _result(quick, sweep, curves, parts, longer)


def training_s(records: Sequence[StepRecord]) -> float:
    """The time of all steps, by the median one of each length of rows: single steps during which the machine did
    something else count no more than others."""
    lengths = {record.batch.sequence_length for record in records}
    spent_s = ([r.timing.step_s for r in records if r.batch.sequence_length == length] for length in lengths)
    return sum(len(of_length) * median(of_length) for of_length in spent_s)


def experts_share(job: JobSpec, size: ModelSize) -> float:
    """The share of a token's operations that its experts are, or the MLPs of a dense model but for the first layer's,
    which are as large."""
    assert size.attention is not None
    mlps = 3 * job.model.hidden_size * job.model.intermediate_size * (job.model.num_hidden_layers - 1)
    return 6.0 * mlps / (6.0 * size.active_parameters + 12.0 * size.attention * LENGTH)


def _loss(of_run: Run) -> float:
    """Infinite where training has failed."""
    return math.inf if of_run["loss"] is None else of_run["loss"]


def tuned_settings(
    start: Setting, ladders: Mapping[str, Sequence[float]], loss_of: Callable[[Setting], float]
) -> dict[Setting, float]:
    """All settings that were tried, with their losses: from the start, to the best neighbour on any ladder, until no
    neighbour is better."""
    tried = {start: loss_of(start)}
    best = start
    while True:
        for key, ladder in ladders.items():
            place = ladder.index(getattr(best, key))
            for value in ladder[max(0, place - 1) : place + 2]:
                setting = replace(best, **{key: value})
                if setting not in tried:
                    tried[setting] = loss_of(setting)
        before, best = best, min(tried, key=lambda setting: tried[setting])
        if best == before:
            return tried


@dataclass(frozen=True)
class Spending:
    """What was spent until a loss.

    Args:
        spent: of what was asked for.
        bound: "exact"; "least": the loss wasn't reached, and more is needed; "most": the first budget reached it.
    """

    spent: float
    bound: str = "exact"


def spending_until(loss: float, runs: Sequence[Run], what: str) -> Spending:
    """What it took to reach a loss, by runs of ascending budgets: between two of them the logarithm of the loss is a
    straight line over that of the spending."""
    if runs[0]["loss"] <= loss:
        return Spending(runs[0][what], "most")
    for before, after in pairwise(runs):
        if after["loss"] <= loss < before["loss"]:
            share = math.log(before["loss"] / loss) / math.log(before["loss"] / after["loss"])
            return Spending(before[what] * (after[what] / before[what]) ** share)
    return Spending(runs[-1][what], "least")


# -- the result ------------------------------------------------------------------------------------------------------


def _result(
    quick: bool,
    sweep: Mapping[str, Any],
    curves: Mapping[str, Sequence[Sequence[Run]]],
    parts: Mapping[str, Sequence[Run]],
    longer: Mapping[str, Run],
) -> Result:
    curves = {name: [[_with_energy(r) for r in of_seed] for of_seed in curve] for name, curve in curves.items()}
    parts = {part: [_with_energy(r) for r in of_part] for part, of_part in parts.items()}
    dense, recipe = curves["dense"], curves["recipe"]
    allowed = [(1.0 + ALLOWED) * of_seed[-1]["loss"] for of_seed in dense]
    whole = [of_seed[SHARES.index(SWEPT)] for of_seed in recipe]
    ratios = {
        what: {
            "recipe": cost_ratio([of_seed[-1] for of_seed in dense], recipe, allowed, what),
            "dense at 3 % more loss": cost_ratio([of_seed[-1] for of_seed in dense], dense, allowed, what),
        }
        for what in SPENT
    }
    behind = {f"{share:g}": _behind([r[n] for r in recipe], [d[n] for d in dense]) for n, share in enumerate(SHARES)}
    table = {
        f"{name}, {share:g}": _shown([of_seed[number] for of_seed in curve])
        for name, curve in curves.items()
        for number, share in enumerate(SHARES)
    }
    table |= {f"recipe without {part}": _shown(of_part) for part, of_part in parts.items()}
    if longer:
        table |= {f"{name}, {LONGER:g}, one seed": _shown([_with_energy(of_run)]) for name, of_run in longer.items()}
        behind |= {f"{LONGER:g}, one seed": _behind([longer["recipe"]], [longer["dense"]])}
    return Result(
        name="compute_to_target",
        seed=0,
        settings={
            "quick": quick,
            "world_size": WORLD_SIZE,
            "flops": QUICK_FLOPS if quick else FLOPS,
            "ladders": QUICK_LADDERS if quick else LADDERS,
            "recipe": asdict(RECIPE),
            "watts": WATTS,
            "joules_per_byte": JOULES_PER_BYTE,
        },
        rounds=len(dense),
        metrics={
            "sweep": sweep,
            "ratios": ratios,
            "behind dense": behind,
            "behind the recipe": {f"without {part}": _behind(of_part, whole) for part, of_part in parts.items()},
            "parts": {
                f"without {part}": {
                    what: cost_ratio(of_part, recipe, [each["loss"] for each in of_part], what) for what in SPENT
                }
                for part, of_part in parts.items()
            },
            "arms": table,
        },
        bars=(_bar("flops_ratio", 3.0, ratios["flops"]), _bar("time_ratio", 2.0, ratios["worker_s"])),
    )


def cost_ratio(
    ours: Sequence[Run], theirs: Sequence[Sequence[Run]], losses: Sequence[float], what: str
) -> Mapping[str, Any]:
    """What these runs took over what others took to reach a loss, seed by seed.

    Args:
        theirs: by seed, runs of ascending budgets.
        losses: by seed, that the others are to reach.
    """
    spendings = [spending_until(loss, runs, what) for loss, runs in zip(losses, theirs, strict=True)]
    values = [each[what] / spending.spent for each, spending in zip(ours, spendings, strict=True)]
    return {"ratio": _interval(values), "spending": [spending.bound for spending in spendings]}


def _bar(name: str, bound: float, ratios: Mapping[str, Any]) -> Bar:
    """Not met where a loss wasn't reached, as the ratio is an upper bound then."""
    bar = at_least(name, bound, ratios["recipe"]["ratio"])
    return replace(bar, met=bar.met and "least" not in ratios["recipe"]["spending"])


def _with_energy(of_run: Run) -> Run:
    return {**of_run, "modelled_energy_j": of_run["worker_s"] * WATTS + of_run["bytes_sent"] * JOULES_PER_BYTE}


def _behind(ours: Sequence[Run], theirs: Sequence[Run]) -> Interval | float:
    return _interval([a["loss"] / b["loss"] - 1.0 for a, b in zip(ours, theirs, strict=True)])


def _interval(values: Sequence[float]) -> Interval | float:
    return mean_interval(values) if len(values) > 1 else values[0]


def _shown(runs: Sequence[Run]) -> dict[str, Any]:
    """The mean of each figure over seeds, and all of the losses."""
    return {**{what: fmean(each[what] for each in runs) for what in runs[0]}, "losses": [each["loss"] for each in runs]}


if __name__ == "__main__":
    run(__doc__, measure, {"results": "benchmarks/results/compute_to_target.jsonl"})
