"""Who is to leave soon: workers on nodes that are drained, and workers that were told to end. Rules of `lifecycle`.

They give their shards to others at a fence, as in any rescale, and are let go; training goes on meanwhile. Whoever has
to leave is never chosen for anything new.
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
    """Enter nodes of this run that are being drained, once each, and who is to leave: a successor must know both before
    it has heard of anybody. A node that was drained doesn't come back."""
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
    told = replace(state, draining=(*state.draining, *fresh))
    return Decision(replace(told, leaving=leavers(told, seen)), notes)


def plan_departure(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a world without the members that are to leave.

    Warm standbys take their places as far as there are any, and the others go on without the rest. Where that would be
    fewer than `workers.min`, the rest stays until its replacements are warm. After a move that failed nobody new is
    tried, and after several none is made until something else has changed.
    """
    leaving = [worker for worker in leavers(state, seen) if worker in state.members]
    if not leaving or state.failures.transitions >= MAX_FAILED_TRANSITIONS:
        return Decision(state)
    planned = state.transition
    if planned is not None and planned.first_step is not None and planned.fence is None:
        state = replace(state, transition=None)  # of the schedule: it is planned again
    if not can_plan(state, seen):
        return Decision(state)
    members = _without(limits, state, leaving, () if state.failures.transitions else warm_standbys(state, seen))
    if members == state.members:
        return Decision(state)
    return planned_transition(
        limits, state, seen, members, SizeChange(len(members), None), why_leaving(state, seen, leaving)
    )


def _without(limits: RunLimits, state: RunState, leaving: list[str], standbys: tuple[str, ...]) -> tuple[str, ...]:
    """The members with as many leavers replaced as there are standbys, and the rest left out if that may be."""
    replaced = dict(zip(leaving, standbys, strict=False))
    rest = leaving[len(replaced) :]
    may_shrink = len(state.members) - len(rest) >= max(1, limits.min_workers)
    out = set(rest) if may_shrink else set()
    return tuple(replaced.get(member, member) for member in state.members if member not in out)


def why_leaving(state: RunState, seen: Observation, leaving: list[str]) -> str:
    """In words, for `status` and `events`."""
    drained = sum(seen.nodes.get(worker, "") in state.draining for worker in leaving)
    because = "its node is drained" if drained else "it was told to end"
    if len(leaving) > 1:
        because = "their nodes are drained" if drained else "they were told to end"
    return f"{', '.join(leaving)} must leave: {because}"


def _seconds_left(seen: Observation, node: str) -> float | None:
    """Until its deadline; None if it has none."""
    deadline = seen.draining[node]
    return round(max(0.0, deadline - seen.now_s), 1) if deadline else None
