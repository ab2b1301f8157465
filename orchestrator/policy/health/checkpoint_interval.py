"""Checkpoint interval with `checkpoint.every: auto`: sqrt(2 * cost * MTBF), of least expected loss.

Seldom checkpoints cost more repeated steps after a failure, frequent ones more training time. The formula is Young's
(A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974), which Daly's (A higher order
estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22(3), 2006) comes to
where the cost is far below the MTBF. Failures count only if they sent the run back to a checkpoint: it recovers from
others in memory.
"""

import math
from dataclasses import replace
from statistics import median

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.training import CheckpointIntervalChosen
from orchestrator.protocol.worker_phase import Phase

PRIOR_S = 6 * 3600.0  # one failure in this time is assumed besides the run's own
SHORTEST_S, LONGEST_S = 120.0, 2400.0  # an alert asks for a checkpoint within an hour
MEASURED = 5  # checkpoints that a choice is based on
CHANGE = 0.1  # of the interval; by less it isn't changed


def mtbf_s(trained_s: float, failures: int) -> float:
    """Mean time between failures, estimated so that it is known before the first one."""
    return (max(trained_s, 0.0) + PRIOR_S) / (failures + 1)


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Training time between two checkpoints, within bounds.

    Args:
        cost_s: training time that one checkpoint takes, seconds.
    """
    return min(LONGEST_S, max(SHORTEST_S, math.sqrt(2 * cost_s * mtbf_s)))


def choose_checkpoint_interval(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Choose the interval again after each complete checkpoint but the last one. A rule of `lifecycle`."""
    now = state.checkpoint_interval
    if not limits.checkpoints_by_time or state.current is None:
        return Decision(state)
    if now.since_s is None:
        return Decision(replace(state, checkpoint_interval=replace(now, since_s=seen.now_s)))
    if now.measured >= state.checkpoint or all(seen.phase(worker) is Phase.FINISHED for worker in state.members):
        return Decision(state)
    measured = replace(now, measured=state.checkpoint, costs_s=(*now.costs_s, *_cost_s(state, seen))[-MEASURED:])
    if not measured.costs_s:
        return Decision(replace(state, checkpoint_interval=measured))
    failures = sum(recovery.source == "checkpoint" for recovery in state.recoveries)
    cost_s, between_s = median(measured.costs_s), mtbf_s(seen.now_s - now.since_s, failures)
    seconds = best_interval_s(cost_s, between_s)
    if abs(seconds - now.seconds) < CHANGE * now.seconds:
        return Decision(replace(state, checkpoint_interval=measured))
    event = CheckpointIntervalChosen(seconds, cost_s, between_s, failures)
    return Decision(replace(state, checkpoint_interval=replace(measured, seconds=seconds)), (event,))


def _cost_s(state: RunState, seen: Observation) -> tuple[float, ...]:
    """Cost of the newest checkpoint on the slowest rank; empty if no report holds it any more."""
    shards = (shard for report in seen.reports.values() for shard in report.shards)
    costs = [shard.cost_s for shard in shards if (shard.generation, shard.step) == state.checkpoint]
    return (max(costs),) if costs else ()
