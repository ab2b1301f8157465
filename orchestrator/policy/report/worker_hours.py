"""Numbers of workers of a run over time, and worker-hours, from the events of its journal. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.policy.report.attempts import Attempt
from orchestrator.protocol.events.generations import Activated
from orchestrator.protocol.events.run import Ended
from orchestrator.protocol.events.workers import WorkerLost, WorkersReleased, WorkersSpawned

RECONCILES = 0.01  # two accounts of worker-hours that differ by no more agree


@dataclass(frozen=True)
class Headcount:
    """Numbers of workers from `time_s` (`time.time()`) on.

    Args:
        members: of the current world, without those known to have failed.
        held: workers spawned and neither released nor failed: members, standbys, and those that start.
    """

    time_s: float
    members: int
    held: int


@dataclass(frozen=True)
class WorkerHours:
    """Worker-hours. `members` and `held` are those of `Headcount`. `by_steps` is a second account of the members'
    hours, from votes and world sizes in step records; it takes only the end of an attempt from events, until which its
    last world lasts.

    Args:
        difference: of `by_steps` from `members`, as a share of the larger; None without members.
        gpu: `held` times the GPUs that each worker reserves.
    """

    members: float
    by_steps: float
    difference: float | None
    held: float
    gpu: float

    @property
    def reconciles(self) -> bool:
        return self.difference is None or abs(self.difference) <= RECONCILES


def worker_hours(headcounts: Sequence[Headcount], by_steps_s: float, gpus_per_worker: float) -> WorkerHours:
    """Worker-hours over these headcounts. Args: by_steps_s: worker-seconds by step records."""
    members = _hours(headcounts, (count.members for count in headcounts))
    held = _hours(headcounts, (count.held for count in headcounts))
    by_steps = by_steps_s / 3600
    larger = max(members, by_steps)
    return WorkerHours(
        members=members,
        by_steps=by_steps,
        difference=(by_steps - members) / larger if larger else None,
        held=held,
        gpu=held * gpus_per_worker,
    )


def headcounts_of(attempt: Attempt) -> tuple[Headcount, ...]:
    """Headcounts of an attempt: one at its beginning, one for each change, and one of 0 at its end."""
    worker_group: set[str] = set()
    members: set[str] = set()
    counts = [Headcount(attempt.began_s, 0, 0)]
    for entry in attempt.events:
        match entry.event:
            case Ended():
                break
            case WorkersSpawned(workers):
                worker_group.update(workers)
            case WorkersReleased(workers):
                worker_group.difference_update(workers)
            case WorkerLost(worker):
                worker_group.discard(worker)
                members.discard(worker)
            case Activated(members=new):
                members = set(new)
            case _:
                continue
        time_s = min(max(entry.time, counts[-1].time_s), attempt.ended_s)  # controllers on two hosts, two clocks
        counts.append(Headcount(time_s, len(members), len(worker_group)))
    counts.append(Headcount(attempt.ended_s, 0, 0))
    return tuple(counts)


def _hours(headcounts: Sequence[Headcount], workers: Iterable[int]) -> float:
    """Worker-hours; each number of workers lasts until the next headcount."""
    times_s = [count.time_s for count in headcounts]
    lasting_s = (after - before for before, after in pairwise(times_s))
    return math.fsum(number * seconds for number, seconds in zip(workers, lasting_s, strict=False)) / 3600
