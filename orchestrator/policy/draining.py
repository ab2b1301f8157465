"""Who is to leave soon: workers on nodes that are drained, and workers that were told to end. Rules of `lifecycle`.

They give their shards to others at a fence, as in any rescale, and are let go; training goes on meanwhile. Whoever has
to leave is never chosen for anything new.
"""

from dataclasses import replace

from orchestrator.policy.leavers import leavers
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.planning_moves import can_plan, planned_move, warm_standbys
from orchestrator.policy.run_state import Decision, Note, Observation, RunState
from orchestrator.policy.schedule import SizeChange


def watch_drains(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Enter nodes of this run that are being drained, once each; a node that was doesn't come back."""
    homes = {seen.nodes.get(worker, "") for worker in state.crew}
    fresh = sorted(node for node in seen.draining if node in homes and node not in state.draining)
    if not fresh:
        return Decision(state)
    notes = tuple(
        Note(
            "node_draining",
            {
                "node": node,
                "workers": [worker for worker in state.crew if seen.nodes.get(worker, "") == node],
                "seconds_left": _seconds_left(seen, node),
            },
        )
        for node in fresh
    )
    return Decision(replace(state, draining=(*state.draining, *fresh)), notes)


def plan_departure(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a world without the members that are to leave: warm standbys take their places as far as there are any, and
    the others go on without them. Fewer than `workers.min` wait for replacements, and leave when these are warm."""
    leaving = [worker for worker in leavers(state, seen) if worker in state.members]
    if not leaving or not can_plan(state, seen):
        return Decision(state)
    standbys = iter(warm_standbys(state, seen))
    members = tuple(
        worker for member in state.members if (worker := next(standbys, None) if member in leaving else member)
    )
    if len(members) < max(1, limits.min_workers):
        return Decision(state)
    return planned_move(limits, state, seen, members, SizeChange(len(members), None), why_leaving(state, seen, leaving))


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
