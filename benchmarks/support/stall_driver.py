"""Stalls of one run on a cluster of its own, by the `orchestrator` of this file's own commit.

    PYTHONPATH=TREE python -P TREE/benchmarks/support/stall_driver.py rescale|recovery ORDER_JSON

`benchmarks.stalls` starts it, and the file of the same name of an older commit, in turn: arguments and output are an
interface between commits. The last line that it prints is JSON: `{"package": the imported package's directory,
"stalls": [{"kind", "stall_s", "step_s"}]}`.

A stall of a rescale lasts from the last vote of the old world to the first vote of the new one, less the median step of
the new world. That of a recovery begins right before the kill, and ends with the first step that users had not been
told of before, less the median step too.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orchestrator
from orchestrator.client import OrchestratorClient
from orchestrator.cluster import local
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.cluster.connection import disconnect
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.journal import read_events

LOOK_EVERY_S = 0.2
PATIENCE_S = 300.0
STEADY_STEPS = 6  # done in a world before it is changed
TYPICAL_STEPS = 20  # of a world, whose median is what a step takes


@dataclass(frozen=True)
class Order:
    """What is measured.

    Args:
        job: a job file's content.
        cycle: the sizes that the run is scaled to, over and over.
        count: rounds of the cycle, or kills.
        seed: of the moments of kills.
    """

    job: dict[str, Any]
    home: str
    num_cpus: int
    cycle: tuple[int, ...]
    count: int
    seed: int


class Run:
    """A run on a local cluster."""

    def __init__(self, client: OrchestratorClient, job: JobSpec) -> None:
        self._client, self._id = client, client.submit(job)
        self._run_dir = Path(client.get(self._id).run_dir)

    def until(self, condition: Callable[[Any], bool], what: str) -> Any:
        """Wait for a status. Raises RuntimeError if the run ends before, or it takes more than `PATIENCE_S`."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(status := self._client.get(self._id)):
            if status.phase.ended or time.monotonic() > deadline_s:
                raise RuntimeError(f"waiting until {what}, but the run is {status.phase}: {status.error or status.why}")
            time.sleep(LOOK_EVERY_S)
        return status

    def steadily(self, workers: int) -> None:
        """Wait until the run has done some steps with so many workers."""
        begun = self.until(lambda s: s.workers_now == workers, f"it has {workers} workers").step
        self.until(lambda s: s.step >= begun + STEADY_STEPS and s.workers_now == workers, "it goes on steadily")

    def members(self) -> list[str]:
        """Of the newest activated generation, by rank."""
        states = [event["state"] for event in self._events() if event["kind"] == "state"]
        newest = next(state["current"] for state in reversed(states) if state["current"] is not None)
        return list(newest["world"]["members"])

    def votes(self, worker: str) -> list[Any]:
        """The records of a worker's steps."""
        return list(self._ask(worker, "call", "report", -1, -1, 0.0).history.records)

    def scaled(self, record_source: str, workers: int) -> dict[str, Any]:
        """The stall of a change to so many workers, as `teller`'s votes have it, who stays a member."""
        known = len(self._client.get(self._id).rescales)
        self._client.scale(self._id, workers)

        def has_it(status: Any) -> bool:
            new = status.rescales[known:]
            return bool(new) and new[-1].to_size == workers and new[-1].stall_s is not None

        self.until(has_it, f"it has {workers} workers")
        self.steadily(workers)
        votes = self.votes(record_source)
        first = next(n for n, vote in enumerate(votes) if vote.generation == votes[-1].generation)
        before, after = votes[first - 1], votes[first]
        step_s = typical_s(votes[first:])
        kind = f"{before.world_size} -> {after.world_size}"
        stall_s = after.timing.vote_time - before.timing.vote_time - step_s
        return {"kind": kind, "stall_s": stall_s, "step_s": step_s}

    def killed(self, chance: random.Random) -> dict[str, Any]:
        """The stall after one worker, not the first, is killed at some moment of a step."""
        members = self.members()
        record_source, victim = members[0], members[1 + chance.randrange(len(members) - 1)]
        target = int(self._ask(victim, "pid"))
        known = len(self._client.get(self._id).recoveries)
        time.sleep(chance.random() * typical_s(self.votes(record_source)[-TYPICAL_STEPS:]))
        fault_time = time.time()
        os.kill(target, signal.SIGKILL)
        status = self.until(
            lambda s: len(s.recoveries) > known and s.recoveries[-1].stall_s is not None, "it has recovered"
        )
        generation = status.recoveries[known].generation
        steps = (event for event in self._events() if event["kind"] == "steps" and event["time"] < fault_time)
        published = max((record["step"] for event in steps for record in event["records"]), default=-1)
        new = [vote for vote in self.votes(record_source) if vote.generation == generation]
        first, step_s = next(vote for vote in new if vote.step > published), typical_s(new)
        return {"kind": "sigkill", "stall_s": first.timing.vote_time - fault_time - step_s, "step_s": step_s}

    def whole(self, workers: int) -> None:
        """Wait until everybody who was lost is replaced, and some steps are done so."""
        self.until(lambda s: s.workers_now == workers and s.standbys == 0, f"it has {workers} workers")
        self.steadily(workers)

    def warm(self, workers: int) -> None:
        """Wait until so many workers are there, whether they train or stand by."""
        self.until(lambda s: s.workers_now + s.standbys == workers and s.step > 1, "all workers are warm")

    def stop(self) -> None:
        self._client.stop(self._id)
        self._client.wait(self._id, timeout_s=PATIENCE_S)

    def _ask(self, worker: str, method: str, *args: Any) -> Any:
        return ask(find(f"{self._id}/worker/{worker}"), method, *args)

    def _events(self) -> list[dict[str, Any]]:
        return read_events(objects_at(self._run_dir))


def typical_s(votes: list[Any]) -> float:
    return median(vote.timing.step_s for vote in votes[:TYPICAL_STEPS])


def rescales(run: Run, order: Order) -> list[dict[str, Any]]:
    run.warm(max(order.cycle))
    record_source = run.members()[0]  # members keep their order, and the last ones leave: it is in every generation
    run.steadily(order.job["workers"]["initial"])
    return [run.scaled(record_source, workers) for _ in range(order.count) for workers in order.cycle]


def recoveries(run: Run, order: Order) -> list[dict[str, Any]]:
    chance, found = random.Random(order.seed), []
    for _ in range(order.count):
        run.whole(order.job["workers"]["initial"])
        found.append(run.killed(chance))
    return found


MEASURES = {"rescale": rescales, "recovery": recoveries}


def main(what: str, order: Order) -> None:
    os.environ["ORCHESTRATOR_HOME"] = order.home
    up = local.up(order.num_cpus)
    try:
        run = Run(OrchestratorClient(up.record.address), JobSpec.model_validate(order.job))
        stalls = MEASURES[what](run, order)
        run.stop()
    finally:
        disconnect()
        local.down()
    print(json.dumps({"package": str(Path(orchestrator.__file__).parent), "stalls": stalls}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Order(**json.loads(sys.argv[2])))
