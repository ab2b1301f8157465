"""How often a run on an overloaded machine takes a healthy worker for dead.

    python -m benchmarks.false_alarms [--quick]

A run with 4 workers, the model of `benchmarks.rescale`, on a local cluster, for 30 minutes. As many other processes as
there are cores do nothing but use them, so a worker gets a fraction of one. Nothing is ever killed: every generation
that is aborted, every worker that is given up and every move that is abandoned is a false alarm. The run is scaled up
and down now and then, since a worker that starts takes most of what is left of the processors, and a move has deadlines
of its own.

`longest_answer_s` is the longest that a warm worker took to answer this process, which asks each of them all the time:
about what its controller sees, which gives up whoever has owed an answer for `patience_s`.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.actor import ActorHandle

from benchmarks.harness import Result, equals, quantile, run, say
from benchmarks.recovery import QUICK_WORKERS, WORKERS, job_of
from benchmarks.rescale import MODEL, QUICK_MODEL
from benchmarks.support.data import prepared_storage
from benchmarks.support.product import LiveRun, Product
from orchestrator.cluster.actors import find, names_of
from orchestrator.cluster.calls import ask
from orchestrator.errors import OrchestratorError
from orchestrator.policy.health.hangs import SILENT_S
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events

ALARMS = ("generation_aborted", "worker_lost", "transition_abandoned")
MINUTES, QUICK_S = 30.0, 10.0
SCALE_EVERY_S = 180.0
ASK_EVERY_S = 0.25
LOOK_EVERY_S = 2.0  # for newcomers
BUSY = "import os\nwhile os.getppid() == {parent}:\n    for _ in range(1_000_000):\n        pass\n"


def measure(quick: bool) -> Result:
    duration_s = QUICK_S if quick else 60.0 * MINUTES
    with tempfile.TemporaryDirectory(prefix="false-alarms-") as folder:
        workspace = Path(folder)
        there = prepared_storage(quick, workspace)
        data, storage = there.data, there.storage
        job = job_of(data, storage, quick).model_copy(update={"name": "healthy"})
        with Product(workspace / "home", num_cpus=WORKERS + 2) as product:
            live = LiveRun(product.client, job)
            live.until(lambda s: s.step > 0, "it trains")
            with busy_cores() as busy, Asking(job.name) as asking:
                begun, begun_s = live.status().step, time.monotonic()
                idle_s, used_s = psutil.cpu_times().idle, _cpu_s(busy)
                scales = scale_up_and_down(live, job.workers.initial, duration_s)
                lasted_s = time.monotonic() - begun_s
                idle_s, used_s = psutil.cpu_times().idle - idle_s, _cpu_s(busy) - used_s
            steps = live.status().step - begun
            live.stop()
        alarms = Counter(event["kind"] for event in read_events(objects_at(live.run_dir)) if event["kind"] in ALARMS)
        for event in read_events(objects_at(live.run_dir)):
            if event["kind"] in ALARMS:
                say(f"false alarm: {event}")
    cores = psutil.cpu_count() or 1
    return Result(
        name="false_alarms",
        seed=0,
        settings={
            "quick": quick,
            "model": QUICK_MODEL if quick else MODEL,
            "workers": QUICK_WORKERS if quick else WORKERS,
            "busy_processes": cores,
            "patience_s": SILENT_S,
        },
        rounds=1,
        metrics={
            **{kind: alarms[kind] for kind in ALARMS},
            "minutes": lasted_s / 60.0,
            "steps": steps,
            "rescales": scales,
            "answers": len(asking.answers_s),
            "longest_answer_s": max(asking.answers_s),
            "answer_p99_s": quantile(asking.answers_s, 0.99),
            "idle_share": idle_s / (cores * lasted_s),
            "share_of_busy_processes": used_s / (cores * lasted_s),
        },
        bars=(equals("false_alarms", 0, alarms.total()),),
    )


@contextmanager
def busy_cores() -> Iterator[list[psutil.Process]]:
    """One process per core that does nothing but compute. They end with this one, however it ends."""
    command = [sys.executable, "-c", BUSY.format(parent=os.getpid())]
    started = [subprocess.Popen(command) for _ in range(psutil.cpu_count() or 1)]
    try:
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def scale_up_and_down(live: LiveRun, size: int, duration_s: float) -> int:
    """Let the run go on for so long, a worker less and a worker more in turn. Returns how often it was scaled."""
    end_s, scales = time.monotonic() + duration_s, 0
    while (left_s := end_s - time.monotonic()) > 0:
        pause_s = min(SCALE_EVERY_S, duration_s / 2)
        time.sleep(min(pause_s, left_s))
        if left_s > pause_s:
            live.scale(size - 1 if scales % 2 == 0 else size, measured=False)
            scales += 1
            say(f"{left_s / 60:.1f} minutes were left, now at step {live.status().step}")
    return scales


class Asking:
    """Asks every worker of a run for its report again and again. `answers_s`: how long those that are warm took."""

    def __init__(self, run_id: str) -> None:
        self._run_id, self._over = run_id, threading.Event()
        self.answers_s: list[float] = []
        self._threads: dict[str, threading.Thread] = {}
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Asking":
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in (self._watcher, *self._threads.values()):
            thread.join()

    def _watch(self) -> None:
        """Newcomers are asked too."""
        while not self._over.wait(LOOK_EVERY_S):
            for name in names_of(self._run_id):
                if name.startswith(f"{self._run_id}/worker/") and name not in self._threads:
                    self._threads[name] = threading.Thread(target=self._ask, args=(find(name),), daemon=True)
                    self._threads[name].start()

    def _ask(self, worker: ActorHandle[Any] | None) -> None:
        was_warm = False  # whoever imports torch may take its time, also for what was asked before it was done
        while worker is not None and not self._over.wait(ASK_EVERY_S):
            asked_s = time.monotonic()
            try:
                report: Report = ask(worker, "call", "report", None, -1, 0.0)
            except OrchestratorError:  # it was let go
                return
            if was_warm:
                self.answers_s.append(time.monotonic() - asked_s)
            was_warm = report.phase not in (Phase.COLD, Phase.WARMING)


def _cpu_s(processes: list[psutil.Process]) -> float:
    times: list[Any] = [process.cpu_times() for process in processes]
    return float(sum(t.user + t.system for t in times))


if __name__ == "__main__":
    run(__doc__, measure)
