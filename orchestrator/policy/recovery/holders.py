"""Failure domains that hold a run's steps. A domain is a node where the run has several, else a process."""

from orchestrator.policy.rescale.generation_plan import nodes_of
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.protocol.messages import GenerationPlan, Keeper


def num_holders(state: RunState, seen: Observation) -> int:
    """The fewest domains that any rank's snapshots are in: 1 where a failure sends the run back to a checkpoint, 0
    without a world."""
    if state.current is None or state.outcome is not None:
        return 0
    return _num_domains(state, seen, _holders(state.current, state.keeping.connected))


def newest_held(state: RunState, seen: Observation) -> int:
    """The newest step that two domains hold, by the members' votes; -1 if there is none."""
    held = (
        report.held
        for report in (seen.report(worker).protection for worker in state.members)
        for plan in (state.previous, state.current)
        if plan is not None and report.settled == plan.generation and _has_two_holders(state, seen, plan)
    )
    return max(held, default=-1)


def _has_two_holders(state: RunState, seen: Observation, plan: GenerationPlan) -> bool:
    """Whether the newest step that its members report as held is in two domains."""
    kept_by = seen.report(plan.world.members[0]).protection.kept_by
    keeper = next((keeper for keeper in state.keeping.chosen if keeper.number == kept_by), None)
    return _num_domains(state, seen, _holders(plan, keeper)) > 1


def _holders(plan: GenerationPlan, keeper: Keeper | None) -> list[tuple[str, ...]]:
    """Each member with the other workers that keep its snapshots."""
    members = plan.world.members
    if keeper is not None and keeper.generation == plan.generation:
        return [(members[0], keeper.worker)]
    return [(member, *(members[ring[rank]] for ring in plan.rings)) for rank, member in enumerate(members)]


def _num_domains(state: RunState, seen: Observation, holders: list[tuple[str, ...]]) -> int:
    """The fewest domains that any of these groups of workers are in."""
    workers = {*state.worker_group, *seen.reports}
    has_nodes = len({seen.nodes[worker] for worker in workers if worker in seen.nodes}) > 1
    return min(len(set(nodes_of(seen, group) if has_nodes else group)) for group in holders)
