"""What compressed gradients save, and what they cost in loss.

    python -m benchmarks.compression [--quick]

The product's own workers, four of them, train a small model on Python's library, all arms with the same tokens, steps
and tuning and, three times over, the same seeds. An arm is a scheme of `communication.compression`; those that end in
`alone` are its control, without error feedback.

- `gradient_bytes_saved`: one less the bytes of gradients that workers sent over those of fp32, indices, scales, warm-up
  and whatever isn't compressed included. `all_bytes_saved`: of everything they sent.
- `loss_gap`: an arm's last validation loss over that of `none` with the same seed, less one.
- `bytes_per_rank`: of a step's gradients at 2, 4 and 8 workers.
- A run of `int4` is scaled 4 -> 2 -> 3 on its way: `residual_sum_error` is how far what error feedback keeps, summed
  over the workers, moved at a fence, over its norm; its last loss is compared with those of the runs that stayed at 4.

The bars are for `int4`, which loses so little that its control shows little. So there is PowerSGD's beside it, over
PowerSGD with feedback: whether the run is long enough for feedback to matter.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.curriculum import MODEL
from benchmarks.harness import Bar, Result, at_least, at_most, equals, median_interval, run, say
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.environment import environment, worker_environment
from orchestrator.data.prepare.job_store import prepare
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from tests.support.worker_group import LocalWorkerGroup

WORKERS, SIZES = 4, (2, 4, 8)
SEEDS, QUICK_SEEDS = 3, 1
STEPS, QUICK_STEPS = 360, 12
SHORT = 6  # steps in which bytes are counted
BATCH = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 128, "lr": 2e-3}
NONE, BEST = "none", "int4"
ARMS: dict[str, dict[str, Any]] = {
    NONE: {"scheme": "none"},
    "bf16": {"scheme": "bf16"},
    "int8": {"scheme": "int8"},
    BEST: {"scheme": "int4"},
    "int4 alone": {"scheme": "int4", "error_feedback": False},
    "topk": {"scheme": "topk", "share": 0.1},
    "topk alone": {"scheme": "topk", "share": 0.1, "error_feedback": False},
    "powersgd": {"scheme": "powersgd", "share": 0.1},
    "powersgd alone": {"scheme": "powersgd", "share": 0.1, "error_feedback": False},
}


@dataclass(frozen=True)
class Trained:
    """A run from beginning to end."""

    loss: float  # of the last validation
    records: tuple[StepRecord, ...]
    residual_error: float = 0.0


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    runs: dict[tuple[str, int], Trained] = {}
    with tempfile.TemporaryDirectory(prefix="compression-") as folder:
        workspace = Path(folder)
        data = data_spec(quick, workspace)
        store = prepare(data.source, data.vocab_size, data.holdout, stores_dir(quick, workspace)).directory

        def trained(name: str, arm: str, seed: int, steps: int, size: int = WORKERS, *sizes: int) -> Trained:
            directory = workspace / name
            directory.mkdir()
            done = train(job_of({"compression": ARMS[arm]}, seed, steps, data), store, directory, size, sizes)
            say(f"{name}: validation loss {done.loss:.4f}")
            return done

        with environment(worker_environment(threads=1, keep_memory=True)):
            for seed in range(seeds):
                for arm in ARMS:
                    runs[arm, seed] = trained(f"{arm}-{seed}", arm, seed, steps)
            moved = trained("scaled", BEST, 0, steps, WORKERS, 2, 3)
            of_size = {
                arm: {size: trained(f"{arm}-of-{size}", arm, 0, SHORT, size) for size in SIZES}
                for arm in (NONE, BEST, "topk")
            }
    return _result(quick, seeds, steps, runs, moved, of_size)


def train(job: JobSpec, store: Path, directory: Path, size: int, sizes: tuple[int, ...]) -> Trained:
    """To the end, at `size` workers and then, after equal stretches, at each of `sizes`."""
    error = 0.0
    with LocalWorkerGroup(job, store, directory, size=max(size, *sizes, 1)) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[:size]))
        for number, now in enumerate(sizes, 1):
            worker_group.await_step(number * job.train.max_steps // (len(sizes) + 1))
            plan = worker_group.rescale(worker_group.ids[:now])
            reports = [worker_group.members[worker].report() for worker in worker_group.living]
            handovers = [h for r in reports for h in r.transition.handovers if h.generation == plan.generation]
            assert all(h.state_identical for h in handovers), handovers
            error = max(error, *(h.residual_error for h in handovers))
        worker_group.await_finished(patience_s=3600.0)
    records = tuple(record for _, record in sorted(worker_group.records.items()))
    losses = [record.validation_loss for record in records if record.validation_loss is not None]
    return Trained(losses[-1], records, error)


def sent(records: tuple[StepRecord, ...], kind: str | None = None) -> tuple[int, int]:
    """Bytes that all workers sent, and what they would be without compression; of a kind, or of all."""
    entries = [t for r in records for k, t in r.communication.traffic.items() if kind in (None, k)]
    return sum(t.sent for t in entries), sum(t.raw for t in entries)


def _result(
    quick: bool,
    seeds: int,
    steps: int,
    runs: dict[tuple[str, int], Trained],
    moved: Trained,
    of_size: dict[str, dict[int, Trained]],
) -> Result:
    table: dict[str, Any] = {}
    for arm in ARMS:
        mine = [runs[arm, seed] for seed in range(seeds)]
        gradients, everything = sent(mine[0].records, "gradient"), sent(mine[0].records)
        table[arm] = {
            "gradient_bytes_saved": 1 - gradients[0] / gradients[1],
            "all_bytes_saved": 1 - everything[0] / everything[1],
            "loss": [run.loss for run in mine],
            "loss_gap": median_interval([run.loss / runs[NONE, seed].loss - 1 for seed, run in enumerate(mine)]),
        }
    per_rank = {
        arm: {size: sent(done.records, "gradient")[0] / size / SHORT for size, done in sizes.items()}
        for arm, sizes in of_size.items()
    }
    worse = [runs["powersgd alone", seed].loss / runs["powersgd", seed].loss - 1 for seed in range(seeds)]
    spread, of_topk = table[BEST]["loss"], per_rank["topk"].values()
    bars: tuple[Bar, ...] = (
        at_least("gradient_bytes_saved", 0.85, table[BEST]["gradient_bytes_saved"]),
        at_most("loss_gap", 0.005, table[BEST]["loss_gap"]),
        at_least("loss_gap_without_feedback", 0.02, table[f"{BEST} alone"]["loss_gap"]),
        at_least("powersgd_without_feedback", 0.02, median_interval(worse)),
        at_most("bytes_per_rank_topk_most_over_least", 1.2, max(of_topk) / min(of_topk)),
        at_most("residual_sum_error", 1e-6, moved.residual_error),
        equals("scaled_within_spread", True, moved.loss <= max(spread) + (max(spread) - min(spread))),
    )
    return Result(
        name="compression",
        seed=0,
        settings={"quick": quick, "workers": WORKERS, "model": MODEL, "train": BATCH, "steps": steps, "arms": ARMS},
        rounds=seeds,
        metrics={
            "arms": table,
            "bytes_per_rank": per_rank,
            "scaled_loss": moved.loss,
            "mean_loss": {arm: mean(entry["loss"]) for arm, entry in table.items()},
        },
        bars=bars,
    )


def job_of(communication: dict[str, Any], seed: int, steps: int, data: DataSpec) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "compression",
            "model": MODEL,
            "train": {**BATCH, "max_steps": steps, "seed": seed, "lr_scheduler": {"warmup_steps": steps // 12}},
            "eval": {"every": steps, "rows": 256},
            "data": data,
            "protection": {"every": "none"},
            "communication": communication,
        }
    )


if __name__ == "__main__":
    run(__doc__, measure)
