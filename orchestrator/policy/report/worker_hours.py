"""How many workers a run had, and for how long, as the events of its journal tell. Pure."""

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
    """From `time_s` (`time.time()`) on.

    Args:
        members: of the current world that are not known to be lost.
        held: workers that the run had asked for and not let go or lost: members, standbys, and those that start.
    """

    time_s: float
    members: int
    held: int


@dataclass(frozen=True)
class WorkerHours:
    """Hours times workers. `members` and `held` are those of `Headcount`; `by_steps` is what step records, their votes
    and world sizes, make of members' hours: a second account of the same thing. All that it has from events is when an
    attempt ended: its last world lasts until then.

    Args:
        difference: of `by_steps` from `members`, as a share of the larger; None where there were no members.
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
    """Args: `by_steps_s` are worker-seconds."""
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
    """One at the attempt's beginning, one for each change, and one with nobody at its end."""
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
    """Each number of workers lasts until the next headcount."""
    times_s = [count.time_s for count in headcounts]
    lasting_s = (after - before for before, after in pairwise(times_s))
    return math.fsum(number * seconds for number, seconds in zip(workers, lasting_s, strict=False)) / 3600
