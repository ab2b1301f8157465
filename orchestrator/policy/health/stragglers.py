"""Stragglers: members much slower than the others for long, by compute time without waits for peers."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.workers import StragglerFound
from orchestrator.protocol.step_record import StepRecord

FACTOR = 1.5  # times the others' time
WINDOW_STEPS = 24
MOST, FEW = 0.75, 0.25  # shares of the window's steps: at which slowness begins, and ends


def slowest(busy_s: Sequence[float]) -> tuple[int, float]:
    """The rank with the longest compute time per micro-batch, and that time over the others' median.

    Args:
        busy_s: by rank, seconds per micro-batch; 0 for a rank without a micro-batch.

    Returns:
        (-1, 1.0) where fewer than two ranks can be compared.
    """
    known = [rank for rank, time_s in enumerate(busy_s) if time_s > 0]
    if len(known) < 2:
        return -1, 1.0
    rank = max(known, key=lambda r: busy_s[r])
    return rank, busy_s[rank] / median(busy_s[r] for r in known if r != rank)


def share_of_slow_steps(records: Sequence[StepRecord], rank: int) -> float:
    """The share of these steps in which the rank was the slowest and slower by `FACTOR`."""
    slow = [r for r in records if r.timing.slowest == rank and r.timing.slowness >= FACTOR]
    return len(slow) / len(records)


def watch_stragglers(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Mark a member that is slow, and clear the mark once it is gone or fast again. A rule of `lifecycle`."""
    if state.straggler and state.straggler not in state.worker_group:
        return Decision(replace(state, straggler=""))
    if state.current is None or state.is_recovering:
        return Decision(state)
    records = [r for r in seen.progress.recent if r.generation == state.current.generation][-WINDOW_STEPS:]
    if len(records) < WINDOW_STEPS:
        return Decision(state)
    if state.straggler:
        is_member = state.straggler in state.members
        share = share_of_slow_steps(records, state.members.index(state.straggler)) if is_member else 1.0
        return Decision(state if share > FEW else replace(state, straggler=""))
    ranks = {r.timing.slowest for r in records if r.timing.slowest >= 0}
    slow = next((rank for rank in sorted(ranks) if share_of_slow_steps(records, rank) >= MOST), None)
    if slow is None:
        return Decision(state)
    worker = state.members[slow]
    times = median(r.timing.slowness for r in records if r.timing.slowest == slow)
    note = StragglerFound(worker, seen.nodes.get(worker, ""), round(times, 2), seen.step)
    return Decision(replace(state, straggler=worker), (note,))


def is_to_be_replaced(limits: RunLimits, state: RunState) -> bool:
    """Whether the straggler is a member and the job has stragglers replaced."""
    return limits.recovery.replace_stragglers and state.straggler in state.members
