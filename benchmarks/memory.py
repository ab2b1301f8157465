"""Peak memory of a worker on Ray over 100 steps and a rescale, beside its engine alone and beside its plan.

    python -m benchmarks.memory [--quick]

For 1, 2 and 4 workers, with the job of `benchmarks.throughput` in fp32:

- `worker`: the largest share of memory (PSS) that a worker of the first world had at any look, until 20 steps after the
  rescale (to 2, to 3 and to 3 workers),
- `engine`: the same of a rank of `benchmarks.baselines.bare_engine`,
- `kept`: bytes of the snapshots and deltas that the plan has for a worker,
- `plan`: what `orchestrator job plan` says that a worker takes.

The last three are those of the world before the rescale or of the one after it, whichever takes more: a lone worker has
no snapshots, and gets them with the second one.

`ratio` is worker over engine + kept; what a fence needs is in the worker's. `plan_error` is plan over worker, less one.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness import Bar, Result, at_most, run, say
from benchmarks.support.arms import START_TIMEOUT_S, Loop
from benchmarks.support.data import stores_dir
from benchmarks.support.environment import worker_environment
from benchmarks.support.memory import proportional_bytes
from benchmarks.support.product import LiveRun, Product
from benchmarks.throughput import BATCH, DATA, MODEL, NEVER, QUICK_MODEL
from orchestrator.data.prepare.job_store import prepare
from orchestrator.policy.estimate.worker_memory import MemoryPlan, plan_memory
from orchestrator.spec.job import JobSpec
from orchestrator.submission.param_listing import state_of

WORLDS = {1: 2, 2: 3, 4: 3}  # and what each is scaled to
QUICK_WORLDS = {1: 2}
STEPS, QUICK_STEPS = 100, 4
STEPS_AFTER, QUICK_STEPS_AFTER = 20, 2
ENGINE_STEPS = 12  # its memory grows no more after a few
LOOK_EVERY_S = 0.05
PATIENCE_S = 1200.0  # for all steps of a world: a lone thread takes 4 s for one
MOST, MOST_OFF = 1.4, 0.1


@dataclass(frozen=True)
class Measured:
    """Bytes."""

    worker: int
    engine: int
    kept: int
    plan: int

    @property
    def ratio(self) -> float:
        return self.worker / (self.engine + self.kept)

    @property
    def plan_error(self) -> float:
        return self.plan / self.worker - 1


def measure(quick: bool) -> Result:
    found: dict[int, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        bench = Bench(Path(folder), quick)
        for size, to in (QUICK_WORLDS if quick else WORLDS).items():
            engines, plans = {n: bench.engine(n) for n in (size, to)}, {n: bench.plan(n) for n in (size, to)}
            kept = {n: plan.snapshots + plan.deltas for n, plan in plans.items()}
            larger = max(size, to, key=lambda n: engines[n] + kept[n])
            peak = max(plan.peak for plan in plans.values())
            found[size] = Measured(bench.worker(size, to), engines[larger], kept[larger], peak)
            say(f"{size} workers: ratio {found[size].ratio:.3f}, plan {found[size].plan_error:+.1%}, {found[size]}")
    bars: list[Bar] = []
    for size, measured in found.items():
        bars.append(at_most(f"ratio, {size} workers", MOST, measured.ratio))
        bars.append(at_most(f"plan_error, {size} workers", MOST_OFF, abs(measured.plan_error)))
    return Result(
        name="memory",
        seed=0,
        settings={"quick": quick, "worlds": QUICK_WORLDS if quick else WORLDS},
        rounds=1,
        metrics={
            str(size): asdict(measured) | {"ratio": measured.ratio, "plan_error": measured.plan_error}
            for size, measured in found.items()
        },
        bars=tuple(bars),
    )


class Bench:
    """One job, with any number of workers."""

    def __init__(self, workspace: Path, quick: bool) -> None:
        self._workspace, self._quick = workspace, quick
        stores = stores_dir(False, workspace)
        self._store = prepare(DATA.source, DATA.vocab_size, DATA.holdout, stores)
        self._storage = workspace / "runs"
        self._storage.mkdir()
        (self._storage / ".data").symlink_to(stores)

    def worker(self, size: int, to: int) -> int:
        """The largest peak of the workers of the first world."""
        steps, after = (QUICK_STEPS, QUICK_STEPS_AFTER) if self._quick else (STEPS, STEPS_AFTER)
        with Product(self._workspace / "home", num_cpus=max(size, to) + 2) as product:
            live = LiveRun(product.client, self._job(size))
            live.until(lambda status: status.step >= 1, "it trains")
            with peaks([pid for name, pid in live.pids().items() if name.startswith("worker/")]) as most:
                live.until(lambda status: status.step >= steps, f"step {steps} is done", PATIENCE_S)
                live.scale(to)
                last = live.status().step + after
                live.until(lambda status: status.step >= last, f"step {last} is done", PATIENCE_S)
            live.stop()
        return most()

    def engine(self, size: int) -> int:
        """The largest peak of the ranks."""
        directory = Path(tempfile.mkdtemp(dir=self._workspace))
        job_file, meeting = directory / "job.json", directory / "meeting"
        job_file.write_text(self._job(size).model_dump_json())
        command = ["benchmarks.baselines.bare_engine", str(job_file), str(self._store.directory), str(meeting)]
        with Loop(command, size, worker_environment(1, keep_memory=True)) as arm, peaks(arm.pids) as most:
            arm.run_block(ENGINE_STEPS, START_TIMEOUT_S)
        return most()

    def plan(self, size: int) -> MemoryPlan:
        job = self._job(size)
        return plan_memory(job, state_of(job), size)

    def _job(self, size: int) -> JobSpec:
        return JobSpec.model_validate(
            {
                "name": f"memory-{size}",
                "workers": {"min": 1, "max": 4, "initial": size},
                "resources": {"cpus": 1},
                "model": QUICK_MODEL if self._quick else MODEL,
                "train": {**BATCH, "max_steps": NEVER, "lr": 1e-3, "lr_scheduler": {"kind": "constant"}},
                "data": DATA.model_dump(),
                "storage": str(self._storage),
            }
        )


@contextmanager
def peaks(pids: list[int]) -> Iterator[Callable[[], int]]:
    """Look at these processes all the time. What is given says the most bytes (PSS) that any of them has had."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY_S):
            for pid in pids:
                try:
                    most[0] = max(most[0], proportional_bytes(pid))
                except OSError:  # it has ended, as the rescale wants it
                    continue

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        yield lambda: most[0]
    finally:
        over.set()
        watching.join()


if __name__ == "__main__":
    run(__doc__, measure)
