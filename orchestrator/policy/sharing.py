"""How a cluster's places are divided among its runs.

    RunScale of each run, who is where, what is free -> divide -> a Share for each run

In this order:

1. Every run that was let in keeps its least. One whose places turn out not to be there, before it has begun, is back
   in the queue.
2. Who waits in the queue is let in, in order of rank, once there is room for its least: in what is free, and in what
   runs of lower priority hold beyond their own least; from runs of its own priority it gets what they would not have
   asked for by themselves. Where that isn't enough, runs of lower priority are preempted. The first that can't be let
   in keeps the nodes that it could use for itself: nobody behind it is let in or grows there, so it doesn't starve.
3. What is left is for what runs want beyond their least, by priority. Of one priority, what a run has comes before what
   another one would like to have; then the older run comes first.

A run's rank in the queue is its priority, and one more for every `AGE_S` that it has waited, so those of low priority
get their turn; once it is in, nobody preempts it for `PROTECTED_S`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policy.seating import Resources, Seating
from orchestrator.protocol.scaling import Grant, RunScale
from orchestrator.spec.autoscale import MANUAL

AGE_S = 600.0
PROTECTED_S = 60.0


@dataclass(frozen=True)
class Share:
    """What a run gets: places for so many workers, standbys included, and what it is granted because of that."""

    places: int
    grant: Grant


def rank_of(run: RunScale, now_s: float) -> int:
    """Its place in the order of the queue, the highest first."""
    return run.priority + (int(max(0.0, now_s - run.queued_s) / AGE_S) if run.queued_s is not None else 0)


def divide(
    runs: Sequence[RunScale],
    claims: Mapping[str, int],
    homes: Mapping[str, Sequence[str]],
    free: Mapping[str, Resources],
    now_s: float,
) -> dict[str, Share]:
    """The share of each run.

    Args:
        claims: how many workers each run would have if there were room, standbys included; no less than its least.
        homes: nodes of the workers that each run has, oldest first, as far as these nodes stay.
        free: what is free on each node that stays.
        now_s: `time.time()`.
    """
    known = {run.run_id: run for run in runs}
    seating = Seating(
        free,
        {run: nodes for run, nodes in homes.items() if run in known},
        {run.run_id: run.request for run in runs},
        {run.run_id: run.avoid for run in runs},
    )
    inside = sorted((r for r in runs if r.queued_s is None), key=lambda r: (-r.priority, r.submitted_s, r.run_id))
    for run in inside:
        seating.keep(run.run_id, run.least)
    scattered = [run for run in inside if not seating.seat(run.run_id, run.least) and not run.has_begun]
    for run in scattered:
        seating.unseat(run.run_id)
    queue = _let_in([run for run in inside if run not in scattered], runs, claims, seating, now_s)
    for priority in sorted({run.priority for run in queue.inside}, reverse=True):
        level = [run for run in queue.inside if run.priority == priority]
        for run in sorted(level, key=is_loose):
            seating.keep(run.run_id, min(claims[run.run_id], has(run)))
        for run in level:
            seating.seat(run.run_id, min(claims[run.run_id], has(run)))
        for run in level:
            seating.seat(run.run_id, claims[run.run_id], queue.nodes_before(priority))
    return {run.run_id: _share(run, seating, queue) for run in runs}


def has(run: RunScale) -> int:
    """How many workers it is to hold by what was decided already, whether they have a place yet or not."""
    return run.grant.of(run.full)


def is_loose(run: RunScale) -> bool:
    """Its size is found for it: what it holds beyond its least is what nobody needed."""
    return run.policy != MANUAL and not run.is_pinned


@dataclass(frozen=True)
class _Queue:
    """Who is in, by priority and age; who is out, and why. `kept` are the nodes that are kept for those who could not
    be let in, with their ranks."""

    inside: tuple[RunScale, ...]
    why_out: Mapping[str, str]
    kept: tuple[tuple[int, frozenset[str]], ...]

    def nodes_before(self, priority: int) -> Collection[str]:
        """Where runs of this priority may not grow."""
        return {node for rank, nodes in self.kept if rank >= priority for node in nodes}


def _let_in(
    inside: Sequence[RunScale],
    runs: Sequence[RunScale],
    claims: Mapping[str, int],
    seating: Seating,
    now_s: float,
) -> _Queue:
    """Let in who can be, in order. Seats their least, and takes away the seats of who is preempted."""
    present = {run.run_id: run for run in inside}
    why_out: dict[str, str] = {}
    kept: list[tuple[int, frozenset[str]]] = []
    waiting = sorted(
        (run for run in runs if run.run_id not in present),
        key=lambda run: (-rank_of(run, now_s), run.submitted_s, run.run_id),
    )
    for run in waiting:
        taken = {node for _, nodes in kept for node in nodes}
        room = _room_for(run, present, claims, seating, taken, now_s)
        if room is None:
            ahead = next(iter(why_out), None) if taken else None
            behind = f"; behind {ahead} in the queue" * (ahead is not None)
            why_out[run.run_id] = f"there is no room for {run.least} worker{'s' * (run.least > 1)}{behind}"
            kept.append((rank_of(run, now_s), frozenset(seating.usable(run.run_id))))
            continue
        for victim in room.victims:
            seating.unseat(victim)
            del present[victim]
            why_out[victim] = f"{run.run_id} of priority {run.priority} needs its places"
        seating.place(run.run_id, room.nodes)
        present[run.run_id] = run
    in_order = sorted(present.values(), key=lambda run: (-run.priority, run.submitted_s, run.run_id))
    return _Queue(tuple(in_order), why_out, tuple(kept))


@dataclass(frozen=True)
class _Room:
    """Places for a run's least, and who has to be preempted for them."""

    nodes: tuple[str, ...]
    victims: tuple[str, ...] = ()


def _room_for(
    run: RunScale,
    present: Mapping[str, RunScale],
    claims: Mapping[str, int],
    seating: Seating,
    taken: Collection[str],
    now_s: float,
) -> _Room | None:
    """Where this run could be let in, with as few runs preempted as are enough; None if that can't be."""
    trial = seating.copy()
    rank = rank_of(run, now_s)
    for other in present.values():
        if other.priority > rank or (other.priority == rank and not is_loose(other)):
            trial.keep(other.run_id, min(claims[other.run_id], has(other)))
    for other in present.values():
        if other.priority > rank or (other.priority == rank and not is_loose(other)):
            trial.seat(other.run_id, min(claims[other.run_id], has(other)))
    if (nodes := _places_in(trial, run, taken)) is not None:
        return _Room(nodes)
    lower = [other for other in present.values() if other.priority < run.priority and is_preemptible(other, now_s)]
    victims: list[RunScale] = []
    for other in sorted(lower, key=lambda other: (other.priority, -other.submitted_s, other.run_id)):
        trial.unseat(other.run_id)
        victims.append(other)
        if _places_in(trial, run, taken) is not None:
            break
    else:
        return None
    needed = [victims.pop()]
    for victim in reversed(victims):  # without the last one it was not enough; of the others, the highest stay first
        spared = trial.copy()
        if spared.seat(victim.run_id, victim.least) and _places_in(spared, run, taken) is not None:
            trial = spared
        else:
            needed.append(victim)
    return _Room(_places_in(trial, run, taken) or (), tuple(victim.run_id for victim in needed))


def is_preemptible(run: RunScale, now_s: float) -> bool:
    """It has been in for a while; before, nobody gets its least."""
    has_rested = run.admitted_s is None or now_s - run.admitted_s >= PROTECTED_S
    return run.queued_s is None and has_rested


def _places_in(seating: Seating, run: RunScale, taken: Collection[str]) -> tuple[str, ...] | None:
    """Nodes of places for its least, none of them `taken`; None if there aren't so many."""
    trial = seating.copy()
    return trial.new_places(run.run_id) if trial.seat(run.run_id, run.least, taken) else None


def _share(run: RunScale, seating: Seating, queue: _Queue) -> Share:
    places = seating.seats(run.run_id)
    if run.run_id in queue.why_out:
        return Share(0, Grant(0, queue.why_out[run.run_id]))
    if places >= run.full:
        return Share(places, Grant(None, f"there is room for all {run.full}"))
    before = [other for other in queue.inside if other.priority > run.priority]
    held = f"; {before[0].run_id} of priority {before[0].priority} comes first" if before else ""
    return Share(places, Grant(max(places, run.least), f"there is room for {places}{held}"))
