"""What it gains to place experts by their loads, on links that let little through.

    python -m benchmarks.placement [--quick]

A model with 16 experts is trained on Python's library by the product. Then its routers are frozen and the text is
another: tables of numbers instead of code, for which some experts get several times the tokens of others. Four hosts,
made of network namespaces (Linux, root), whose links let 150 Mbit/s through, do steps of that, one worker on each.

- `speedup`: the step with equally many experts per worker, in order, over that with experts placed by load, for which a
  layer may have 4 copies of experts. `shuffled`, the control, is placed by the same loads of other experts.
- `rank_load`: largest load of a rank over the mean, mean over layers, in these steps.
- `stall_s`: how long the product's training stood still when it moved the experts of a run on request; `gained`: its
  steps before over those after. `digests_differ` counts tensors of that exact run's last checkpoint that differ from
  those of a run by one worker, and workers whose state was not the same after the move.
- `moved_balanced`: experts that a request moves of a run whose routers are balanced, as they were trained.
"""

import gzip
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import (
    Result,
    Spread,
    alternate,
    at_least,
    at_most,
    equals,
    median_interval,
    ratios,
    run,
    say,
)
from benchmarks.support.data import data_spec
from benchmarks.support.host_losses import hosted_run
from benchmarks.support.placed_experts import Settings, steps_of
from benchmarks.support.product import Product
from orchestrator.data.prepare.job_store import prepare
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.policy.rescale.expert_packing import Ranks, pack, peak
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.submission.model_process import export_model
from orchestrator.submission.submission import resolved
from tests.support.calm_runs import calm_run, tensors_of
from tests.support.host_ranks import HostRanks
from tests.support.hosts import Hosts

RANKS, MBIT, COPIES = 4, 150.0, 4
TRAINED_STEPS, QUICK_TRAINED_STEPS = 250, 20
STEPS, QUICK_STEPS = 6, 1  # of an arm in a round
ROUNDS, QUICK_ROUNDS = 6, 1
RUNS, QUICK_RUNS = 3, 1
LINES = 100  # of a file of a table
BEFORE, AFTER = 20, 16  # steps of a run around the move
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
}
TRAINED = ["*.experts.*", "*.attention.*", "*norm*"]  # not routers, and of what remains the smallest part
LENGTH, ROWS, AT_ONCE, VOCAB = 128, 128, 32, 512
STATIC, BY_LOAD, SHUFFLED = "static", "by_load", "shuffled"


@dataclass(frozen=True)
class Moved:
    """What a run showed that moved its experts on request."""

    stall_s: float
    gained: float
    before: float
    after: float
    differ: int


def measure(quick: bool) -> Result:
    if (why := Hosts.available()) is not None:
        raise SystemExit(f"this benchmark needs hosts of its own: {why}")
    rounds, runs, steps = (QUICK_ROUNDS, QUICK_RUNS, QUICK_STEPS) if quick else (ROUNDS, RUNS, STEPS)
    with tempfile.TemporaryDirectory(prefix="placement-") as folder:
        workspace = Path(folder)
        storage, library = workspace / "runs", _library(quick, workspace)
        storage.mkdir()
        trained = _train(workspace, storage, library, quick)
        tables = _tables(workspace)
        seconds, peaks = _in_engines(trained, tables, workspace, rounds, steps)
        moved = [_in_a_run(_job(f"moved-{seed}", storage, trained, tables, seed), workspace) for seed in range(runs)]
        kept = _kept(_balanced_job(storage, trained, library))
    speedup = median_interval(ratios(seconds[STATIC], seconds[BY_LOAD]))
    stall, gained = (median_interval([getattr(m, name) for m in moved]) for name in ("stall_s", "gained"))
    differ = sum(m.differ for m in moved)
    return Result(
        name="placement",
        seed=0,
        settings={"quick": quick, "ranks": RANKS, "mbit": MBIT, "model": MODEL, "rows": ROWS, "copies": COPIES},
        rounds=rounds,
        metrics={
            "step_s": {arm: Spread.of(found) for arm, found in seconds.items()},
            "speedup": speedup,
            "speedup_shuffled": median_interval(ratios(seconds[STATIC], seconds[SHUFFLED])),
            "rank_load": {arm: Spread.of(found) for arm, found in peaks.items()},
            "runs": [vars(m) for m in moved],
            "stall_s": stall,
            "gained": gained,
            "digests_differ": differ,
            "moved_balanced": kept,
        },
        bars=(
            at_most("rank_load", 1.10, max(peaks[BY_LOAD])),
            at_least("speedup", 1.3, speedup),
            at_most("stall_s", 0.5, stall),
            equals("digests_differ", 0, differ),
            equals("moved_balanced", 0, kept),
        ),
    )


# -- What is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trained:
    """A model on Python's library, as a directory that a run may begin with."""

    directory: Path


def _library(quick: bool, workspace: Path) -> DataSpec:
    """Python's library, with so small a vocabulary that a step computes little."""
    return data_spec(quick, workspace).model_copy(update={"vocab_size": VOCAB})


def _train(workspace: Path, storage: Path, library: DataSpec, quick: bool) -> _Trained:
    steps = QUICK_TRAINED_STEPS if quick else TRAINED_STEPS
    train = {"max_steps": steps, "lr": 3e-3, "global_batch_size": 16, "micro_batch_size": 8, "sequence_length": LENGTH}
    plain = {"name": "trained", "model": MODEL, "train": train, "storage": str(storage)}
    job = JobSpec.model_validate({**plain, "data": library.model_dump()})
    with Product(workspace / "home", num_cpus=4) as product:
        status = product.client.wait(product.client.submit(job))
    say(f"trained on Python's library: {status.phase}, loss {status.loss:.3f}")
    checkpoint, to = Path(str(status.checkpoint)), workspace / "trained"
    export_model(storage / "trained", job, checkpoint, to, "fp32", False)
    return _Trained(to)


def _tables(workspace: Path) -> Path:
    """The tables of measurements that scikit-learn ships, in files of `LINES` lines."""
    folder, directory = workspace / "tables", resources.files("sklearn.datasets.data")
    folder.mkdir()
    for file in sorted(directory.iterdir(), key=lambda file: file.name):
        packed = file.name.endswith(".csv.gz")
        if packed or file.name.endswith(".csv"):
            data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
            lines = data.decode().splitlines(keepends=True)
            for begin in range(0, len(lines), LINES):
                (folder / f"{file.name}-{begin}.txt").write_text("".join(lines[begin : begin + LINES]))
    return folder


def _job(name: str, storage: Path, trained: _Trained, source: Path, seed: int, **more: Any) -> JobSpec:
    """The trained model with frozen routers, exactly, on another text."""
    train = {"max_steps": 1000, "lr": 1e-3, "lr_scheduler": {"kind": "constant"}, "seed": seed}
    train |= {"global_batch_size": ROWS, "micro_batch_size": AT_ONCE}
    plain = {
        "name": name,
        "workers": RANKS,
        "experts": {"placement": {"num_redundant_experts": COPIES}},
        "model": {"init_from": str(trained.directory), "bias_update_speed": 0.0},
        "train": train | {"sequence_length": LENGTH, "trainable": TRAINED, "determinism": "exact"},
        "data": {"source": str(source)},
        "storage": str(storage),
    }
    return resolved(JobSpec.model_validate(plain | more))


def _balanced_job(storage: Path, trained: _Trained, library: DataSpec) -> JobSpec:
    """The trained model, whose routers go on to be trained on the same text."""
    train = {"max_steps": 1000, "lr": 1e-3, "global_batch_size": ROWS, "micro_batch_size": AT_ONCE}
    more = {"model": {"init_from": str(trained.directory)}, "train": train | {"sequence_length": LENGTH}}
    return _job("balanced", storage, trained, Path(library.source), 0, **more, data={"source": library.source})


# -- In engines that take turns ----------------------------------------------------------------------------------------


def _in_engines(
    trained: _Trained, tables: Path, workspace: Path, rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step by arm and round, and the largest load of a rank over the mean, over layers."""
    job = _job("engines", workspace, trained, tables, 0)
    job = job.model_copy(update={"train": job.train.model_copy(update={"determinism": "default"})})
    store = prepare(
        str(tables), VOCAB, 0.05, workspace / "tables-store", tokenizer=trained.directory / "tokenizer.json"
    )
    peaks: dict[str, list[float]] = {STATIC: [], BY_LOAD: [], SHUFFLED: []}
    with Hosts(RANKS) as hosts, HostRanks(hosts) as ranks:
        for index in range(RANKS):
            hosts.limit(index, MBIT)

        def steps_with(arm: str, placement: ExpertPlacement, seed: int = 0) -> tuple[float, NDArray[np.float64]]:
            settings = Settings(job, store.directory, placement, steps, seed)
            seconds, loads = ranks.run(steps_of, settings, timeout_s=1200.0)[0]
            sum_LE = np.sum(loads, axis=0)
            layers = zip(job.model.moe_layers, sum_LE, strict=True)
            by_layer = [peak(load_E, placement.holders_of(layer), RANKS_OF) for layer, load_E in layers]
            peaks[arm].append(float(np.mean(by_layer)))  # each layer has as many tokens
            say(f"{arm}: {np.mean(seconds):.2f} s per step, rank load by layer {np.round(by_layer, 2)}")
            return float(np.mean(seconds)), sum_LE

        balanced = ExpertPlacement.balanced(MODEL["n_routed_experts"], RANKS)
        _, load_LE = steps_with(STATIC, balanced, seed=1)  # other rows than those that are measured
        peaks[STATIC].clear()
        mixed_LE = np.random.default_rng(0).permuted(load_LE, axis=1)
        placements = {STATIC: balanced, BY_LOAD: _placed(job, load_LE), SHUFFLED: _placed(job, mixed_LE)}
        arms = {arm: lambda arm=arm, placed=placed: steps_with(arm, placed)[0] for arm, placed in placements.items()}
        return alternate(arms, rounds), peaks


RANKS_OF = Ranks.of(RANKS, MODEL["n_routed_experts"], COPIES)


def _placed(job: JobSpec, load_LE: NDArray[np.float64]) -> ExpertPlacement:
    """The placement that the product chooses with these loads."""
    balanced = ExpertPlacement.balanced(MODEL["n_routed_experts"], RANKS)
    layers = zip(job.model.moe_layers, load_LE, strict=True)
    placed = tuple((layer, pack(load_E, balanced.holders, RANKS_OF, COPIES)) for layer, load_E in layers)
    return ExpertPlacement(balanced.num_experts, RANKS, balanced.holders, placed)


# -- In runs of the product --------------------------------------------------------------------------------------------


def _in_a_run(job: JobSpec, workspace: Path) -> Moved:
    """A run that moves its experts on request, and one by a worker alone that does as many steps."""
    with hosted_run(job, MBIT) as (_, live):
        live.until(lambda s: s.step > BEFORE, "it trains")
        live.rebalance()
        step = live.until(lambda s: bool(s.rescales), "experts have moved").rescales[0].step
        live.until(lambda s: s.step > step + AFTER, "it trains on")
    ended = live.ended
    records = [r for r in read_steps(live.run_dir) if r.step >= 2]  # the first ones have memory to make
    before, after = ([r for r in records if (r.step <= step) is is_before] for is_before in (True, False))
    after = after[2:]
    moved = Moved(
        stall_s=_stall(ended),
        gained=Spread.of([r.timing.step_s for r in before]).median / Spread.of([r.timing.step_s for r in after]).median,
        before=Spread.of([1 + (r.routing.experts.rank_violation or 0.0) for r in before]).median,
        after=Spread.of([1 + (r.routing.experts.rank_violation or 0.0) for r in after]).median,
        differ=_differing(job, ended, workspace / f"calm-{job.name}"),
    )
    say(f"{job.name}: {moved}")
    return moved


def _stall(ended: RunStatus) -> float:
    assert ended.rescales[0].stall_s is not None
    return ended.rescales[0].stall_s


def _differing(job: JobSpec, ended: RunStatus, directory: Path) -> int:
    calm = calm_run(job, ended, directory)
    ours, theirs = tensors_of(ended.checkpoint), tensors_of(calm.checkpoint)
    assert ours.keys() == theirs.keys()
    return sum(ours[name] != theirs[name] for name in ours) + (not ended.rescales[0].state_identical)


def _kept(job: JobSpec) -> int:
    """Experts that a request moves of a run whose routers are balanced."""
    with hosted_run(job, MBIT) as (_, live):
        live.until(lambda s: s.step > BEFORE, "it trains")
        live.rebalance()
        live.until(lambda _: bool(live.events("experts_kept", "experts_rebalanced")), "the request is answered")
        (answer,) = live.events("experts_kept", "experts_rebalanced")
    say(f"balanced routers: {answer}")
    return int(answer.get("num_moved", 0))


if __name__ == "__main__":
    run(__doc__, measure)
