"""Number of failure domains that hold the newest committed step. A domain is a node where the run has several, else a
process."""

from orchestrator.policy.rescale.generation_plan import nodes_of
from orchestrator.policy.state.run_state import Observation, RunState


def num_holders(state: RunState, seen: Observation) -> int:
    """2 where every rank's snapshots are in another domain as well, 1 where a failure sends the run back to a
    checkpoint, 0 without a world."""
    plan, keeper = state.current, state.keeping.connected
    if plan is None or state.outcome is not None:
        return 0
    members = plan.world.members
    pairs = [(member, members[buddy]) for member, buddy in zip(members, plan.buddies, strict=False)]
    if keeper is not None and keeper.generation == plan.generation:
        pairs = [(members[0], keeper.worker)]
    if not pairs:
        return 1
    has_nodes = len({seen.nodes[worker] for worker in state.worker_group if worker in seen.nodes}) > 1
    is_apart = (len(set(nodes_of(seen, pair))) == 2 for pair in pairs)
    return 2 if not has_nodes or all(is_apart) else 1
