"""Classes of failures, what each may cost, and when enough is enough.

A failure is a moment, not a worker: whoever is lost in the same moment in the same way is one. Each class has a budget
per hour (`orchestrator.spec.fault_tolerance`). Budgets end runs that fail slowly; a run that fails without doing a step
ends by `recovery.MAX_FRUITLESS`, and one whose workers never get warm by `endings.MAX_FAILED_SPAWNS`.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from orchestrator.policy.health.leaving import is_to_leave
from orchestrator.policy.state.run_state import Observation, RunState, WorkerFailure
from orchestrator.spec.fault_tolerance import BudgetsSpec

WINDOW_S = 3600.0  # of a budget, and of a quarantine
BURST_S = 60.0  # failures within this are in a row
FREE_FAILURES = 3  # in a row, before replacements are held back
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 30.0

PLACE = (
    "worker",
    "node",
    "network",
    "hang",
    "preemption",
    "corrupted",
)  # where it happened may be to blame, not the run itself
REMEDIES = {
    "worker": "Look at the end of the workers' logs, and at the system log for processes that were killed.",
    "node": "Look at the nodes.",
    "network": "Look at the network between the nodes.",
    "hang": "Look at where the workers' logs end.",
    "preemption": "Use nodes that last longer.",
    "user_error": "Correct the model's code.",
    "out_of_memory": "Ask for more memory per worker, for more workers, or for shorter rows.",
    "numeric": "Lower train.lr, or look at the data of the steps that were left out.",
    "storage": "Look at the run storage.",
    "corrupted": "Test the memory of the nodes.",
    "internal": "This is an error of the orchestrator: report it with the traceback.",
}


def cause_of_loss(state: RunState, seen: Observation, worker: str) -> str:
    """The class of a failure, by what is known of it."""
    report = seen.reports.get(worker)
    if worker in seen.lost or report is None or report.error is None:
        known = seen.causes.get(worker, "worker")
        return "preemption" if known in ("worker", "node") and is_to_leave(state, seen, worker) else known
    return report.error.kind


def count_failures(failures: Sequence[WorkerFailure], now_s: float, window_s: float = WINDOW_S) -> Counter[str]:
    """How many failures of each class lie within the window."""
    recent = {(failure.cause, failure.time_s) for failure in failures if now_s - failure.time_s <= window_s}
    return Counter(cause for cause, _ in recent)


def exceeded_budget(failures: Sequence[WorkerFailure], now_s: float, budgets: BudgetsSpec) -> str:
    """Why the run must end, with the figures and a remedy; empty as long as every class is within its budget."""
    for cause, count in sorted(count_failures(failures, now_s).items()):
        name = cause if cause in BudgetsSpec.model_fields else "internal"
        budget: int = getattr(budgets, name)
        if count > budget:
            return (
                f"{count} failures of the kind {cause} within an hour; recovery.budgets.{name} is {budget}. "
                f"{REMEDIES[name]}"
            )
    return ""


def delay_s(failures: Sequence[WorkerFailure], now_s: float) -> float:
    """How long after the newest failure nobody is started in its place: nothing for the first few in a row, then twice
    as long for each further one."""
    in_a_row = sum(count_failures(failures, now_s, BURST_S).values())
    if in_a_row <= FREE_FAILURES:
        return 0.0
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (in_a_row - FREE_FAILURES - 1))


def held_back_s(failures: Sequence[WorkerFailure], now_s: float) -> float:
    """Seconds until the next worker may be started."""
    newest = max((failure.time_s for failure in failures), default=-MAX_DELAY_S)
    return max(0.0, newest + delay_s(failures, now_s) - now_s)


def quarantined(
    failures: Sequence[WorkerFailure],
    now_s: float,
    after: int | None,
    nodes: Collection[str],
    before: Collection[str] = (),
) -> tuple[str, ...]:
    """Nodes that get no new workers: so many failures that may be their fault lie within the window.

    Args:
        after: how many; None for never.
        nodes: where workers are known to live. One of them at least is never quarantined: the run needs a place. While
            nobody lives anywhere, no node is added to those `before`.
    """
    counts = failures_by_node(failures, now_s)
    bad = tuple(sorted(node for node, count in counts.items() if after is not None and count >= after))
    if not nodes:
        return tuple(node for node in bad if node in before)
    return bad if set(nodes) - set(bad) else ()


def failures_by_node(failures: Sequence[WorkerFailure], now_s: float) -> Counter[str]:
    """How many failures that may be the fault of their place each node has seen within the window."""
    moments = {
        (failure.node, failure.time_s)
        for failure in failures
        if failure.node and failure.cause in PLACE and now_s - failure.time_s <= WINDOW_S
    }
    return Counter(node for node, _ in moments)
