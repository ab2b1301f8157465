"""Workers that are to leave soon."""

from orchestrator.policy.state.run_state import Observation, RunState


def leavers(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Workers of the group whose node is drained, or that were asked to end, oldest first."""
    return tuple(worker for worker in state.worker_group if is_to_leave(state, seen, worker))


def is_to_leave(state: RunState, seen: Observation, worker: str) -> bool:
    """Whether the worker is a leaver, or was one when it failed."""
    return seen.report(worker).health.leaving or worker in state.leaving or seen.nodes.get(worker, "") in state.draining
