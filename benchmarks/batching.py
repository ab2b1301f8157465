"""What micro-batches of like length that fill the memory are worth, where documents are of very unequal length.

    python -m benchmarks.batching [--quick]

The corpus is Python's library cut into its functions and classes: half of them have no more than 414 characters, one in
a hundred more than 18,500. A row is a definition, or a piece of 1,024 tokens of a long one. Two workers train on it,
and all processes of the cluster share a limit of memory that the kernel enforces. All arms run in it, one after the
other, the order turned round in every other round:

- `dynamic`: `data.row_format: documents`, `micro_batch_size: auto`. The first micro-batches are small, and grow by what
  is measured.
- `fixed`: the same rows in micro-batches of as many rows, in their order, as fit if all of them are as long as they may
  be: the largest divisor of the batch with which a micro-batch has no more tokens than those that `dynamic` found to
  fit.
- `padded`: the same micro-batches as `fixed`, as most trainers do it: padding goes through the whole model. Its loss
  holds all logits of a micro-batch, which is as fast (`benchmarks.loss`).
- `packed`: `data.row_format: packed`, documents back to back in rows of 1,024 tokens, a third as many, in
  micro-batches that fit.

`tokens_per_s` is of target tokens, over the median step once micro-batches have their size. `padding` is the share of
the micro-batches' tokens; `peak_share` the most memory that the limited processes had, over the limit, and `kills` what
the kernel has killed. The ratios are of `dynamic` over the others, round by round.
"""

import ast
import json
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.curriculum import MODEL as SMALL_MODEL
from benchmarks.harness import Interval, Result, Spread, at_least, equals, median_interval, ratios, run, say
from benchmarks.support.confinement import Confinement, confined, why_not
from benchmarks.support.data import QUICK_FILES
from benchmarks.support.product import LiveRun, Product
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.job import JobSpec

WORLD_SIZE = 2
LIMIT, QUICK_LIMIT = 3 * 2**30, 4 * 2**30
ROUNDS, QUICK_ROUNDS = 3, 1
STEPS, QUICK_STEPS = 6, 4  # that are measured
FITTING_STEPS = 18  # at most, before
LENGTH, QUICK_LENGTH = 1024, 128
ROWS, QUICK_ROWS = 48, 32
PACKED = 3  # rows in one of full length, about
# Deep and narrow: much to keep for the backward pass for each token, and little to compute.
MODEL = SMALL_MODEL | {"num_hidden_layers": 8}
ARMS = ("fixed", "padded", "packed", "dynamic")


@dataclass(frozen=True)
class Measured:
    tokens_per_s: float
    padding: float
    micro_batches: float
    micro_batch_tokens: int
    peak_share: float
    kills: int


def definitions(quick: bool, directory: Path) -> Path:
    """A file of all functions and classes at the top of a module of Python's library, one a line."""
    library, path = Path(sysconfig.get_path("stdlib")), directory / "definitions.jsonl"
    names = [library / f"{name}.py" for name in QUICK_FILES] if quick else sorted(library.rglob("*.py"))
    with path.open("w", encoding="utf-8") as file:
        for name in names:
            if {"site-packages", "test", "tests"} & set(name.parts) or not name.exists():
                continue
            try:
                text = name.read_text(encoding="utf-8")
                module = ast.parse(text)
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in module.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    file.write(json.dumps({"text": ast.get_source_segment(text, node)}) + "\n")
    return path


def job_of(arm: str, micro_batch: int | str, corpus: Path, storage: Path, quick: bool) -> JobSpec:
    """Defaults but for sizes."""
    by_document = arm != "packed"
    steps = (QUICK_STEPS if quick else STEPS) + (FITTING_STEPS if arm == "dynamic" else 2)
    return JobSpec.model_validate(
        {
            "name": f"batching-{arm}",
            "workers": WORLD_SIZE,
            "model": MODEL | ({"entrypoint": "benchmarks.baselines.padded:build"} if arm == "padded" else {}),
            "train": {
                "max_steps": steps,
                "global_batch_size": (QUICK_ROWS if quick else ROWS) // (1 if by_document else PACKED),
                "micro_batch_size": micro_batch,
                "sequence_length": QUICK_LENGTH if quick else LENGTH,
                "lr": 1e-3,
            },
            "data": {"source": str(corpus), "row_format": "documents" if by_document else "packed", "vocab_size": 2048},
            "storage": str(storage),
        }
    )


def measured(product: Product, job: JobSpec, confinement: Confinement, quick: bool) -> Measured:
    """Run a job to its end."""
    live = LiveRun(product.client, job, name=f"{job.name}-{time.time_ns()}")
    confinement.peak_bytes, kills = 0, confinement.kills
    ended = live.wait()
    if ended.phase is not RunPhase.SUCCEEDED or ended.recoveries:
        raise RuntimeError(f"{job.name} is {ended.phase}, {ended.recoveries}: {ended.error or ended.why}")
    peak = confinement.peak_bytes
    steps = read_steps(live.run_dir)[-(QUICK_STEPS if quick else STEPS) :]
    if len({step.generation for step in steps}) > 1:
        raise RuntimeError(f"micro-batches of {job.name} still changed in step {steps[0].step}")
    micro_batches = [plan.micro_batch for _, plan in sorted(live.plans().items())]
    return Measured(
        tokens_per_s=median(step.batch.tokens / step.timing.step_s for step in steps),
        padding=mean(step.batch.padding for step in steps),
        micro_batches=mean(step.batch.num_micro_batches for step in steps),
        micro_batch_tokens=micro_batches[-1].tokens or micro_batches[-1].rows * job.train.sequence_length,
        peak_share=peak / confinement.limit_bytes,
        kills=confinement.kills - kills,
    )


def micro_batch_of_rows(tokens: int, length: int, batch: int) -> int:
    """The largest divisor of the batch with which a micro-batch of the longest rows has no more than so many tokens."""
    return max(rows for rows in range(1, batch + 1) if batch % rows == 0 and rows <= max(1, tokens // length))


def measure(quick: bool) -> Result:
    if (why := why_not()) is not None:
        raise SystemExit(f"this benchmark needs a limit of memory: {why}")
    rounds, limit = (QUICK_ROUNDS, QUICK_LIMIT) if quick else (ROUNDS, LIMIT)
    found: dict[str, list[Measured]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="batching-") as folder:
        workspace = Path(folder)
        corpus = definitions(quick, workspace)
        with confined(limit) as confinement, Product(workspace / "home", WORLD_SIZE) as product:

            def one(arm: str, micro_batch: int | str) -> None:
                job = job_of(arm, micro_batch, corpus, workspace / "runs", quick)
                found[arm].append(measured(product, job, confinement, quick))
                say(f"{arm}: {found[arm][-1]}")

            one("dynamic", "auto")
            length, batch = (QUICK_LENGTH, QUICK_ROWS) if quick else (LENGTH, ROWS)
            fits = found["dynamic"][0].micro_batch_tokens
            rows = micro_batch_of_rows(fits, length, batch)
            micro_batches = {
                "dynamic": "auto",
                "packed": micro_batch_of_rows(fits, length, batch // PACKED),
                **dict.fromkeys(ARMS[:2], rows),
            }
            for number in range(rounds):
                for arm in ARMS[:: 1 if number % 2 else -1]:
                    if number or arm != "dynamic":
                        one(arm, micro_batches[arm])
    ratio = {arm: _over(found["dynamic"], found[arm]) for arm in ARMS if arm != "dynamic"}
    dynamic = found["dynamic"]
    peak = min(m.peak_share for m in dynamic)
    return Result(
        name="batching",
        seed=0,
        settings={
            "quick": quick,
            "workers": WORLD_SIZE,
            "model": MODEL,
            "limit_bytes": limit,
            "fixed_rows": rows,
            "rows": batch,
            "longest_row": length,
        },
        rounds=rounds,
        metrics={
            **{arm: _summary(measures) for arm, measures in found.items()},
            "tokens_per_s_ratio": ratio,
            "peak_share": [round(m.peak_share, 3) for m in dynamic],
            "kills": sum(m.kills for measures in found.values() for m in measures),
        },
        bars=(
            at_least("tokens_per_s_ratio", 1.3, ratio["fixed"]),
            at_least("tokens_per_s_ratio_padded", 1.3, ratio["padded"]),
            equals("out_of_memory_kills", 0, sum(m.kills for measures in found.values() for m in measures)),
            at_least("peak_share", 0.8, peak),
        ),
    )


def _over(dynamic: list[Measured], others: list[Measured]) -> Interval:
    return median_interval(ratios([m.tokens_per_s for m in dynamic], [m.tokens_per_s for m in others]))


def _summary(measures: list[Measured]) -> dict[str, Any]:
    return {
        "tokens_per_s": Spread.of([m.tokens_per_s for m in measures]),
        "padding": round(mean(m.padding for m in measures), 4),
        "micro_batches_per_step": mean(m.micro_batches for m in measures),
        "micro_batch_tokens": [m.micro_batch_tokens for m in measures],
        "peak_share": round(max(m.peak_share for m in measures), 3),
    }


if __name__ == "__main__":
    run(__doc__, measure)
