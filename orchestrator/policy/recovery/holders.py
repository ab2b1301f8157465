"""Failure domains that hold a run's steps. A domain is a node where the run has several, else a process."""

from orchestrator.policy.rescale.generation_plan import nodes_of
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.messages import GenerationPlan, Keeper


def num_holders(state: RunState, seen: Observation) -> int:
    """2 where every rank's snapshots are in another domain as well, 1 where a failure sends the run back to a
    checkpoint, 0 without a world."""
    if state.current is None or state.outcome is not None:
        return 0
    keeper = state.keeping.connected
    pairs = _pairs(state.current, keeper)
    return 2 if pairs and _are_apart(state, seen, pairs) else 1


def newest_held(state: RunState, seen: Observation) -> int:
    """The newest step that two domains hold, by the members' votes; -1 if there is none."""
    held = (
        report.protection.held
        for worker in state.members
        if (report := seen.reports.get(worker)) is not None
        for plan in (state.previous, state.current)
        if plan is not None and report.protection.settled == plan.generation and _has_two_holders(state, seen, plan)
    )
    return max(held, default=-1)


def _has_two_holders(state: RunState, seen: Observation, plan: GenerationPlan) -> bool:
    """Whether the newest step that its members report as held is in two domains."""
    report = seen.reports.get(plan.world.members[0])
    kept_by = report.protection.kept_by if report is not None else -1
    keeper = next((keeper for keeper in state.keeping.chosen if keeper.number == kept_by), None)
    pairs = _pairs(plan, keeper)
    return bool(pairs) and _are_apart(state, seen, pairs)


def _pairs(plan: GenerationPlan, keeper: Keeper | None) -> list[tuple[str, str]]:
    """Each member and the worker that keeps its snapshots; none where they have no other holder."""
    members = plan.world.members
    if keeper is not None and keeper.generation == plan.generation:
        return [(members[0], keeper.worker)]
    return [(member, members[buddy]) for member, buddy in zip(members, plan.buddies, strict=False)]


def _are_apart(state: RunState, seen: Observation, pairs: list[tuple[str, str]]) -> bool:
    """Whether both of each pair are in different domains."""
    workers = {*state.worker_group, *seen.reports}
    has_nodes = len({seen.nodes[worker] for worker in workers if worker in seen.nodes}) > 1
    return not has_nodes or all(len(set(nodes_of(seen, pair))) == 2 for pair in pairs)
