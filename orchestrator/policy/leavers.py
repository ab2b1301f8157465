"""Which workers are to leave soon."""

from orchestrator.policy.run_state import Observation, RunState


def leavers(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Workers of the crew whose node is drained, or who were told to end, oldest first."""
    return tuple(worker for worker in state.crew if _is_to_leave(state, seen, worker))


def _is_to_leave(state: RunState, seen: Observation, worker: str) -> bool:
    report = seen.reports.get(worker)
    return seen.nodes.get(worker, "") in state.draining or (report is not None and report.leaving)
