"""Departure of workers on drained nodes and of workers that were asked to end. Rules of `lifecycle`.

They hand their shards over at a fence, as in any rescale, and are released; training continues meanwhile. A worker that
has to leave is never chosen for a new generation.
"""

from dataclasses import replace

from orchestrator.policy.health.leaving import leavers
from orchestrator.policy.rescale.generation_plan import (
    MAX_FAILED_TRANSITIONS,
    can_plan,
    planned_transition,
    warm_standbys,
)
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange
from orchestrator.protocol.events.workers import NodeDraining


def watch_drains(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Record nodes of this run that are being drained, once each, and the workers that leave: a successor needs both
    before it has received any report. A drained node doesn't come back."""
    homes = {seen.nodes.get(worker, "") for worker in state.worker_group}
    fresh = sorted(node for node in seen.draining if node in homes and node not in state.draining)
    notes = tuple(
        NodeDraining(
            node,
            tuple(worker for worker in state.worker_group if seen.nodes.get(worker, "") == node),
            _seconds_left(seen, node),
        )
        for node in fresh
    )
    drained = replace(state, draining=(*state.draining, *fresh))
    return Decision(replace(drained, leaving=leavers(drained, seen)), notes)


def plan_departure(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a world without the members that are to leave.

    Warm standbys replace as many of them as they can; the others are dropped. Where that would leave fewer than
    `workers.min`, they stay until their replacements are warm. After a failed transition no new worker is tried, and
    after `MAX_FAILED_TRANSITIONS` in a row none is planned until something else has changed.
    """
    leaving = [worker for worker in leavers(state, seen) if worker in state.members]
    if not leaving or state.failures.transitions >= MAX_FAILED_TRANSITIONS:
        return Decision(state)
    planned, free = state.transition, state
    if planned is not None and planned.first_step is not None and planned.fence is None:
        free = replace(state, transition=None)  # a scheduled one, to be planned again
    if not can_plan(free, seen):
        return Decision(state)
    members = _without(limits, free, leaving, () if free.failures.transitions else warm_standbys(free, seen))
    if members == state.members:
        return Decision(state)
    return planned_transition(
        limits, free, seen, members, SizeChange(len(members), None), why_leaving(state, seen, leaving)
    )


def _without(limits: RunLimits, state: RunState, leaving: list[str], standbys: tuple[str, ...]) -> tuple[str, ...]:
    """The members, with leavers replaced by standbys where there are any and otherwise left out if the size allows."""
    replaced = dict(zip(leaving, standbys, strict=False))
    rest = leaving[len(replaced) :]
    may_shrink = len(state.members) - len(rest) >= max(1, limits.min_workers)
    out = set(rest) if may_shrink else set()
    return tuple(replaced.get(member, member) for member in state.members if member not in out)


def why_leaving(state: RunState, seen: Observation, leaving: list[str]) -> str:
    """The reason as text, for `status` and `events`."""
    drained = sum(seen.nodes.get(worker, "") in state.draining for worker in leaving)
    because = "its node is drained" if drained else "it was asked to end"
    if len(leaving) > 1:
        because = "their nodes are drained" if drained else "they were asked to end"
    return f"{', '.join(leaving)} must leave: {because}"


def _seconds_left(seen: Observation, node: str) -> float | None:
    """Seconds until the node's deadline; None if it has none."""
    deadline = seen.draining[node]
    return round(max(0.0, deadline - seen.now_s), 1) if deadline else None
