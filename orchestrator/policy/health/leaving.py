"""Which workers are to leave soon."""

from orchestrator.policy.state.run_state import Observation, RunState


def leavers(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Workers of the worker group whose node is drained, or who were told to end, oldest first."""
    return tuple(worker for worker in state.worker_group if is_to_leave(state, seen, worker))


def is_to_leave(state: RunState, seen: Observation, worker: str) -> bool:
    """Whether it is a leaver, or was one when it was lost."""
    report = seen.reports.get(worker)
    told = report is not None and report.leaving
    return told or worker in state.leaving or seen.nodes.get(worker, "") in state.draining
