"""Failure classes, their hourly budgets, the delay of replacements, and quarantine of nodes.

A failure is a moment, not a worker: workers that fail in the same moment with the same cause count once. Each class has
a budget per hour (`orchestrator.spec.fault_tolerance`). Budgets end runs that fail slowly; a run that fails without
a step is ended by `recover.MAX_FRUITLESS`, one that can't train and whose workers never get warm by
`termination.MAX_FAILED_SPAWNS`. A run that trains loses nothing by workers that fail before they train: others are
started after ever longer delays, and they count in no budget.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from orchestrator.policy.health.leaving import is_to_leave
from orchestrator.policy.state.run_parts import FailureState, WorkerFailure
from orchestrator.policy.state.run_state import Observation, RunState
from orchestrator.spec.fault_tolerance import BudgetsSpec

WINDOW_S = 3600.0  # of a budget, and of a quarantine
BURST_S = 60.0  # failures within this count as in a row
FREE_FAILURES = 3  # in a row, before replacements are held back
FIRST_DELAY_S, MAX_DELAY_S = 1.0, 30.0
FREE_SPAWNS = 2  # attempts in a row to start workers that never got warm, before the next one is held back
FIRST_SPAWN_DELAY_S, MAX_SPAWN_DELAY_S = 5.0, 60.0

PLACE = (
    "worker",
    "node",
    "network",
    "hang",
    "preemption",
    "corrupted",
)  # the place may be to blame, not the run itself
REMEDIES = {
    "worker": "Look at the end of the workers' logs, and at the system log for processes that were killed.",
    "node": "Look at the nodes.",
    "network": "Look at the network between the nodes.",
    "hang": "Look at where the workers' logs end.",
    "preemption": "Use nodes that last longer.",
    "user_error": "Correct the model's code.",
    "out_of_memory": "Ask for more memory per worker, for more workers, or for shorter rows.",
    "numeric": "Lower train.lr, or look at the data of the steps that were left out.",
    "corrupted": "Test the memory and the GPUs of the nodes.",
    "internal": "This is an error of the orchestrator: report it with the traceback.",
}


def cause_of_loss(state: RunState, seen: Observation, worker: str) -> str:
    """The class of a worker's failure: its own error's kind, or that of its process's end."""
    error = seen.report(worker).health.error
    if worker in seen.lost or error is None:
        known = seen.causes.get(worker, "worker")
        return "preemption" if known in ("worker", "node") and is_to_leave(state, seen, worker) else known
    return error.kind


def count_failures(failures: Sequence[WorkerFailure], now_s: float, window_s: float = WINDOW_S) -> Counter[str]:
    """Number of failures of each class within the window."""
    recent = {(failure.cause, failure.time_s) for failure in failures if now_s - failure.time_s <= window_s}
    return Counter(cause for cause, _ in recent)


def exceeded_budget(failures: Sequence[WorkerFailure], now_s: float, budgets: BudgetsSpec) -> str:
    """Why the run must end, with the figures and a remedy; empty as long as every class is within its budget."""
    trained = [failure for failure in failures if failure.is_member]
    for cause, count in sorted(count_failures(trained, now_s).items()):
        name = cause if cause in BudgetsSpec.model_fields else "internal"
        budget: int = getattr(budgets, name)
        if count > budget:
            return (
                f"{count} failures of the kind {cause} within an hour; recovery.budgets.{name} is {budget}. "
                f"{REMEDIES[name]}"
            )
    return ""


def delay_s(failures: Sequence[WorkerFailure], now_s: float) -> float:
    """Delay after the newest failure before a replacement starts: none for the first `FREE_FAILURES` in a row, then
    doubling with each further one up to `MAX_DELAY_S`."""
    in_a_row = sum(count_failures(failures, now_s, BURST_S).values())
    if in_a_row <= FREE_FAILURES:
        return 0.0
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (in_a_row - FREE_FAILURES - 1))


def held_back_s(failures: Sequence[WorkerFailure], now_s: float) -> float:
    """Seconds until the next worker may be started."""
    newest = max((failure.time_s for failure in failures), default=-MAX_DELAY_S)
    return max(0.0, newest + delay_s(failures, now_s) - now_s)


def spawns_held_back_s(failures: FailureState, now_s: float, is_urgent: bool = False) -> float:
    """Seconds until the next worker may be started, where the last ones may have failed before they were warm: after
    `FREE_SPAWNS` attempts the delay doubles with each further one, up to `MAX_SPAWN_DELAY_S`.

    Args:
        is_urgent: members that are about to leave wait for it: the first delay is the longest, then.
    """
    held_s = held_back_s([failure for failure in failures.recent if failure.is_member], now_s)
    if failures.attempts <= FREE_SPAWNS:
        return held_s
    longest_s = FIRST_SPAWN_DELAY_S if is_urgent else MAX_SPAWN_DELAY_S
    doublings = min(failures.attempts - FREE_SPAWNS - 1, 16)  # no overflow after days
    delay_s = min(longest_s, FIRST_SPAWN_DELAY_S * 2.0**doublings)
    return max(held_s, failures.spawn_s + delay_s - now_s)


def quarantined(
    failures: Sequence[WorkerFailure],
    now_s: float,
    after: int | None,
    nodes: Collection[str],
    before: Collection[str] = (),
) -> tuple[str, ...]:
    """Nodes that get no new workers, because too many failures that may be their fault lie within the window.

    Args:
        after: number of failures; None for never.
        nodes: where workers are known to live. One of them at least is never quarantined: the run needs a place. While
            no worker's node is known, none is added to those `before`.
    """
    counts = failures_by_node(failures, now_s)
    bad = tuple(sorted(node for node, count in counts.items() if after is not None and count >= after))
    if not nodes:
        return tuple(node for node in bad if node in before)
    return bad if set(nodes) - set(bad) else ()


def failures_by_node(failures: Sequence[WorkerFailure], now_s: float) -> Counter[str]:
    """Number of failures within the window that may be the fault of the node, by node."""
    moments = {
        (failure.node, failure.time_s)
        for failure in failures
        if failure.node and failure.cause in PLACE and now_s - failure.time_s <= WINDOW_S
    }
    return Counter(node for node, _ in moments)
