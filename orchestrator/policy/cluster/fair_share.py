"""Division of a cluster's places among its runs.

    ScalingView of each run, homes of workers, free resources -> divide -> a Share for each run -> new_grants

In this order:

1. Every admitted run keeps its least. One whose places are gone before it has begun returns to the queue.
2. Queued runs are admitted in order of rank, once there is room for their least: in free resources, and in those that
   runs of lower priority hold beyond their own least; from runs of its own priority a queued run gets only places that
   no user asked for. Where that isn't enough, runs of lower priority are preempted. The first run that can't be
   admitted reserves the nodes that it could use: no run behind it is admitted or grows there, so it doesn't starve;
   only places taken from preempted runs belong to the run that preempts them. A run that doesn't fit the empty cluster
   reserves nothing.
3. The rest goes to what runs want beyond their least, by priority. Within a priority, places that a run holds come
   before places that another one wants; then the older run comes first.

A run's rank in the queue is its priority, plus one for every `AGE_S` that it has waited for a world of its own, so runs
of low priority get their turn. It is not preempted before it has had a world for `PROTECTED_S`, if it starts in time.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.policy.cluster.bin_packing import NodePacking, Resources
from orchestrator.policy.cluster.grants import FairShare
from orchestrator.protocol.scaling import Grant, ScalingView
from orchestrator.spec.workers import MANUAL

AGE_S = 600.0
PROTECTED_S = 60.0
STARTING_S = 600.0  # an admitted run without a world by then is no longer protected


def rank_of(run: ScalingView, now_s: float) -> int:
    """The run's rank in the queue; the highest is first."""
    return run.priority + (int(max(0.0, now_s - run.queued_s) / AGE_S) if run.queued_s is not None else 0)


def divide(
    runs: Sequence[ScalingView],
    claims: Mapping[str, int],
    homes: Mapping[str, Sequence[str]],
    free: Mapping[str, Resources],
    now_s: float,
) -> dict[str, FairShare]:
    """The share of each run.

    Args:
        claims: workers that each run would have if there were room, standbys included; no less than its least.
        homes: nodes of the workers that each run has, oldest first, without nodes that are leaving.
        free: free resources of each node that stays.
        now_s: `time.time()`.
    """
    known = {run.run_id: run for run in runs}
    packing = NodePacking(
        free,
        {run: nodes for run, nodes in homes.items() if run in known},
        {run.run_id: run.request for run in runs},
        {run.run_id: run.avoid for run in runs},
    )
    inside = sorted((run for run in runs if run.queued_s is None), key=_seniority)
    _hold(packing, inside, {run.run_id: run.least for run in inside})
    scattered = [run for run in inside if not run.has_begun and packing.num_placed(run.run_id) < run.least]
    for run in scattered:
        packing.unseat(run.run_id)
    queue = _let_in([run for run in inside if run not in scattered], runs, claims, packing, now_s)
    for priority in sorted({run.priority for run in queue.inside}, reverse=True):
        level = [run for run in queue.inside if run.priority == priority]
        _hold(packing, sorted(level, key=is_loose), {r.run_id: min(claims[r.run_id], has(r)) for r in level})
        for run in level:
            packing.place(run.run_id, claims[run.run_id], queue.nodes_before(priority))
    return {run.run_id: _share(run, packing, queue) for run in runs}


def has(run: ScalingView) -> int:
    """Number of workers that the run is to hold by its present grant, placed or not."""
    return run.grant.of(run.full)


def is_loose(run: ScalingView) -> bool:
    """Whether the run's size is found for it: workers beyond its least use places that no other run needed."""
    return run.policy != MANUAL and not run.is_pinned


def is_preemptible(run: ScalingView, now_s: float) -> bool:
    """Whether the run has trained for `PROTECTED_S` since its admission, or has not begun within `STARTING_S`."""
    if run.begun_s is not None:
        return now_s - run.begun_s >= PROTECTED_S
    return run.admitted_s is None or now_s - run.admitted_s >= STARTING_S


def _seniority(run: ScalingView) -> tuple[int, float, str]:
    return -run.priority, run.submitted_s, run.run_id


def _hold(packing: NodePacking, runs: Sequence[ScalingView], places: Mapping[str, int]) -> None:
    """Give each run its number of places if there are: to all runs those that their workers have, then others."""
    for run in runs:
        packing.keep(run.run_id, places[run.run_id])
    for run in runs:
        packing.place(run.run_id, places[run.run_id])


@dataclass(frozen=True)
class _Kept:
    """Nodes reserved for a run that could not be admitted."""

    run_id: str
    rank: int
    nodes: frozenset[str]


@dataclass(frozen=True)
class _Queue:
    """Admitted runs by priority and age, reasons of the runs that are not, and reserved nodes."""

    inside: tuple[ScalingView, ...]
    why_out: Mapping[str, str]
    kept: tuple[_Kept, ...]

    def nodes_before(self, priority: int) -> Collection[str]:
        """Nodes on which runs of this priority may not grow."""
        return {node for kept in self.kept if kept.rank >= priority for node in kept.nodes}


def _let_in(
    inside: Sequence[ScalingView],
    runs: Sequence[ScalingView],
    claims: Mapping[str, int],
    packing: NodePacking,
    now_s: float,
) -> _Queue:
    """Admit queued runs in order. Places their least, and takes the places of preempted runs away."""
    present = {run.run_id: run for run in inside}
    why_out: dict[str, str] = {}
    kept: list[_Kept] = []
    waiting = sorted(
        (run for run in runs if run.run_id not in present),
        key=lambda run: (-rank_of(run, now_s), run.submitted_s if run.queued_s is None else run.queued_s, run.run_id),
    )
    for run in waiting:
        taken = {node for other in kept for node in other.nodes}
        room = _room_for(run, present, claims, packing, taken, now_s)
        if room is None:
            most = packing.capacity(run.run_id)
            why_out[run.run_id] = _why_out(run, most, kept[0].run_id if kept else None)
            if most >= run.least:
                kept.append(_Kept(run.run_id, rank_of(run, now_s), frozenset(packing.usable(run.run_id))))
            continue
        for victim in room.victims:
            packing.unseat(victim)
            del present[victim]
            why_out[victim] = f"{run.run_id} of priority {run.priority} needs its places"
        packing.keep(run.run_id, run.least)
        packing.place_on(run.run_id, room.nodes)
        present[run.run_id] = run
    return _Queue(tuple(sorted(present.values(), key=_seniority)), why_out, tuple(kept))


def _why_out(run: ScalingView, most: int, ahead: str | None) -> str:
    if most < run.least:
        return f"the cluster has room for at most {most} of its workers; it needs at least {run.least}"
    behind = f"; behind {ahead} in the queue" * (ahead is not None)
    return f"there is no room for {run.least} worker{'s' * (run.least > 1)}{behind}"


@dataclass(frozen=True)
class _Room:
    """Places for a run's least, apart from those that it has, and the runs to preempt for them."""

    nodes: tuple[str, ...]
    victims: tuple[str, ...] = ()


def _room_for(
    run: ScalingView,
    present: Mapping[str, ScalingView],
    claims: Mapping[str, int],
    packing: NodePacking,
    taken: Collection[str],
    now_s: float,
) -> _Room | None:
    """Places to admit this run with, preempting as few runs as are enough; None if it can't be admitted."""
    trial, rank = packing.copy(), rank_of(run, now_s)
    firm = [o for o in present.values() if o.priority > rank or (o.priority == rank and not is_loose(o))]
    _hold(trial, firm, {other.run_id: min(claims[other.run_id], has(other)) for other in firm})
    trial.withhold(taken)
    if (nodes := _places_in(trial, run)) is not None:
        return _Room(nodes)
    lower = [o for o in present.values() if o.priority < run.priority and o.queued_s is None]
    victims: list[ScalingView] = []
    for other in sorted((o for o in lower if is_preemptible(o, now_s)), key=_seniority, reverse=True):
        trial.unseat(other.run_id)
        victims.append(other)
        if _places_in(trial, run) is not None:
            break
    else:
        return None
    needed = [victims.pop()]
    for victim in reversed(victims):  # the last is needed; of the others, the highest priority is spared first
        spared = trial.copy()
        if spared.place(victim.run_id, victim.least) and _places_in(spared, run) is not None:
            trial = spared
        else:
            needed.append(victim)
    return _Room(_places_in(trial, run) or (), tuple(victim.run_id for victim in needed))


def _places_in(packing: NodePacking, run: ScalingView) -> tuple[str, ...] | None:
    """Nodes of places for the run's least, apart from those that it has; None if there are too few."""
    trial = packing.copy()
    return trial.new_places(run.run_id) if trial.place(run.run_id, run.least) else None


def _share(run: ScalingView, packing: NodePacking, queue: _Queue) -> FairShare:
    places = packing.num_placed(run.run_id)
    if run.run_id in queue.why_out:
        gives_way = run.grant.workers == 0 and packing.has_homes(run.run_id)  # keeps the preemption as its reason
        return FairShare(0, run.grant if gives_way else Grant(0, queue.why_out[run.run_id]))
    if places >= run.full:
        return FairShare(places, Grant(None, f"there is room for all {run.full}"))
    return FairShare(
        places, Grant(max(places, run.least), f"there is room for {places}{_held_by(run, packing, queue)}")
    )


def _held_by(run: ScalingView, packing: NodePacking, queue: _Queue) -> str:
    """The run that holds, or waits for, places that this run could use, as text; empty if there is none."""
    nodes = packing.usable(run.run_id)
    for other in queue.inside:
        if other.priority > run.priority and nodes & set(packing.places(other.run_id)):
            return f"; {other.run_id} of priority {other.priority} comes first"
    waiting = (kept.run_id for kept in queue.kept if kept.rank >= run.priority and nodes & kept.nodes)
    return next((f"; {run_id} waits for its place" for run_id in waiting), "")
