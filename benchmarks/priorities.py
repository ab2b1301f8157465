"""What a run of low priority gives up for one of high priority, how soon, and how soon it has it back.

    python -m benchmarks.priorities [--quick]

A cluster with room for two workers. A run of the model of `benchmarks.rescale` trains on both, and may have one. In
each round a run of higher priority is submitted that needs one worker, trains for some steps and ends.

- `shrink_s`: from the moment at which the high run is let in, says its journal, until the low one's smaller world is
  activated. `high_first_step_s` is until the high run's first step: its worker starts meanwhile.
- `grow_back_s`: from the high run's end, says its journal, until the low run's larger world is activated. Of it,
  `freed_s` is until the low run is granted the place, `warm_s` from there until its new worker is warm, and `join_s`
  the move.
- `steps_lost`: of the low run, committed ones that were lost and finished ones that were done again.
- `shrink_stall_s`, `grow_stall_s`: how long the low run stood still for each.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, at_most, equals, median_interval, run, say
from benchmarks.rescale import BATCH, MODEL, NEVER, QUICK_MODEL
from benchmarks.support.data import prepared_storage
from benchmarks.support.product import LiveRun, Product
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events

PLACES = 2
STEPS = 20  # of the high run
ROUNDS, QUICK_ROUNDS = 5, 1

Event = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """Seconds, as the module says."""

    shrink_s: float
    high_first_step_s: float
    shrink_stall_s: float
    freed_s: float
    warm_s: float
    join_s: float
    grow_back_s: float
    grow_stall_s: float
    steps_lost: int


def measure(quick: bool) -> Result:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    found: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="priorities-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, storage = there.data, there.storage
        with Product(workspace / "home", num_cpus=PLACES) as product:
            low = LiveRun(product.client, job_of("low", f"1..{PLACES}", 0, NEVER, data, storage, quick))
            low.until(lambda s: s.step > 20 and s.workers_now == PLACES, "the low run trains")
            for number in range(rounds):
                job = job_of(f"high-{number}", "1..1", 5, STEPS, data, storage, quick)
                found.append(round_of(product, low, job))
                say(f"round {number + 1}: {found[-1]}")
            status = low.until(lambda s: s.phase is RunPhase.TRAINING, "the low run trains")
    values = {name: [asdict(one)[name] for one in found] for name in asdict(found[0])}
    return Result(
        name="priorities",
        seed=0,
        settings={"quick": quick, "model": QUICK_MODEL if quick else MODEL, "places": PLACES},
        rounds=rounds,
        metrics={name: median_interval(of) for name, of in values.items() if name != "steps_lost"}
        | {"recoveries": len(status.recoveries)},
        bars=(
            at_most("shrink_s", 2.0, median_interval(values["shrink_s"])),
            equals("steps_lost", 0, sum(values["steps_lost"])),
            at_most("grow_back_s", 5.0, median_interval(values["grow_back_s"])),
        ),
    )


def job_of(name: str, workers: str, priority: int, steps: int, data: DataSpec, storage: Path, quick: bool) -> JobSpec:
    least, most = map(int, workers.split(".."))
    return JobSpec.model_validate(
        {
            "name": name,
            "priority": priority,
            "workers": {"min": least, "max": most, "initial": most},
            "resources": {"cpus": 1},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {**BATCH, "max_steps": steps, "lr": 3e-4, "lr_scheduler": {"kind": "constant"}},
            "data": data,
            "storage": str(storage),
        }
    )


def round_of(product: Product, low: LiveRun, job: JobSpec) -> Round:
    """A run of higher priority comes and goes."""
    known = len(low.until(lambda s: s.workers_now == PLACES, "the low run has all places").rescales)
    high = LiveRun(product.client, job)
    status = low.until(
        lambda s: len(s.rescales) >= known + 2 and s.rescales[known + 1].stall_s is not None, "the low run is back"
    )
    shrunk, grown = status.rescales[known : known + 2]
    of_low, of_high = read_events(objects_at(low.run_dir)), read_events(objects_at(high.run_dir))
    let_in = _time(of_high, "admitted")
    ended = _time(of_high, "ended")
    smaller, larger = (_time(of_low, "activated", generation=change.generation) for change in (shrunk, grown))
    granted = _time(of_low, "granted", workers=None, after=ended)
    planned = _time(of_low, "generation_planned", generation=grown.generation)
    return Round(
        shrink_s=smaller - let_in,
        high_first_step_s=next(iter(read_steps(high.run_dir))).timing.vote_time - let_in,
        shrink_stall_s=shrunk.stall_s or 0.0,
        freed_s=granted - ended,
        warm_s=planned - granted,
        join_s=larger - planned,
        grow_back_s=larger - ended,
        grow_stall_s=grown.stall_s or 0.0,
        steps_lost=shrunk.steps_lost
        + grown.steps_lost
        + sum(r.steps_lost + r.steps_replayed for r in status.recoveries),
    )


def _time(events: Sequence[Event], kind: str, after: float = 0.0, **fields: Any) -> float:
    """When the first event of this kind, with these fields, was written down."""
    return next(
        float(event["time"])
        for event in events
        if event["kind"] == kind and event["time"] > after and all(event[k] == v for k, v in fields.items())
    )


if __name__ == "__main__":
    run(__doc__, measure)
