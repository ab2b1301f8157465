"""Experts moved by their loads: a generation of the same members with another placement. Rules of `lifecycle`.

    balance_experts    on request, or when the gain is worth the stall -> plan g+1 -> (transition) READY -> activate
    measure_balance    steps before and after -> share of a step's time that follows the load of the busiest rank

How much of a step waits for the busiest rank is not known before the first change. From the second on it is measured.
"""

from dataclasses import replace
from statistics import median

from orchestrator.policy.rescale.generation_plan import MAX_FAILED_TRANSITIONS, can_plan, nodes_of, planned_transition
from orchestrator.policy.rescale.load_placement import num_moved, placed_by_load, violation_of
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import typical_step_s
from orchestrator.policy.state.run_parts import Rebalance
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange
from orchestrator.protocol.events.training import ExpertsKept, RebalanceMeasured
from orchestrator.spec.moe.experts import BY_LOAD

LEAST_GAIN = 0.1  # of the busiest rank's load, by which a placement must lower it to replace another without a request
LEAST_ON_REQUEST = 0.05  # likewise on request: what balanced routers leave uneven differs as much from batch to batch
KNOWN_STEPS = 20  # with loads, before placements follow from them
GUESSED_SHARE = 0.5  # of a step's time that follows the busiest rank's load, until it was measured
GUESSED_STALL_S = 1.0
PAYS = 2.0  # times its stall that a change must save
MEASURED_STEPS = 12  # of a generation, from which the duration of its steps is taken


def balance_experts(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a generation whose experts are placed by load, if it was asked for or pays."""
    asked = state.target.rebalances > state.balance.requests
    if not (asked or limits.placement.policy == BY_LOAD) or not can_plan(state, seen) or state.current is None:
        return Decision(state)
    if not asked and (not _is_known(state, seen) or state.failures.transitions >= MAX_FAILED_TRANSITIONS):
        return Decision(state)
    heard = replace(state, balance=replace(state.balance, requests=state.target.rebalances))
    nodes = nodes_of(seen, state.members)
    was = state.current.placement
    placement = placed_by_load(limits, seen, was, nodes)
    before, after = (violation_of(limits, seen, each, nodes) for each in (was, placement))
    why_not = _why_not(limits, seen, before, after)
    if why_not or seen.step + 1 >= limits.steps:
        return Decision(heard, (ExpertsKept(seen.step, before, why_not or "the run is at its end"),) if asked else ())
    if not asked and not _pays(limits, state, seen, before, after):
        return Decision(state)
    step_s = typical_step_s(seen.progress) or 0.0
    rebalance = Rebalance(state.num_generations, before, after, num_moved(limits, was, placement), step_s)
    why = "experts are placed by load" + " as asked" * asked
    change = SizeChange(len(state.members), None)
    return planned_transition(limits, heard, seen, state.members, change, why, placement, rebalance)


def measure_balance(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Compare the duration of steps before and after the newest change of the placement."""
    newest = state.balance.unmeasured
    if newest is None:
        return Decision(state)
    after = [r.timing.step_s for r in seen.progress.recent if r.generation == newest.generation]
    if len(after) < MEASURED_STEPS:
        is_over = state.activated > newest.generation
        return Decision(replace(state, balance=replace(state.balance, unmeasured=None)) if is_over else state)
    after_s = median(after)
    lighter = 1 - (1 + newest.after) / (1 + newest.before)
    share = state.balance.share
    if lighter >= LEAST_GAIN and newest.step_s > 0:
        share = min(max((1 - after_s / newest.step_s) / lighter, 0.0), 1.0)
    measured = replace(state.balance, unmeasured=None, share=share)
    note = RebalanceMeasured(newest.generation, seen.step, newest.step_s, after_s)
    return Decision(replace(state, balance=measured), (note,))


def _is_known(state: RunState, seen: Observation) -> bool:
    """Whether loads are known, and the present generation has done enough steps to judge its placement."""
    trained = sum(r.generation == state.activated for r in seen.progress.recent[-KNOWN_STEPS:])
    return seen.progress.loads.num_steps >= KNOWN_STEPS and trained >= KNOWN_STEPS


def _why_not(limits: RunLimits, seen: Observation, before: float, after: float) -> str:
    """Why no other placement is better; empty if one is."""
    if not seen.progress.loads.num_steps:
        return "no loads are known yet"
    if 1 + after > (1 + before) * (1 - LEAST_ON_REQUEST):
        return f"the busiest worker has {1 + before:.2f} times the mean load, and no placement lowers that by 5 %"
    return ""


def _pays(limits: RunLimits, state: RunState, seen: Observation, before: float, after: float) -> bool:
    """Whether the steps that are left get shorter by more than the stall."""
    lighter = 1 - (1 + after) / (1 + before)
    if lighter < LEAST_GAIN:
        return False
    share = GUESSED_SHARE if state.balance.share is None else state.balance.share
    stalls = [rescale.stall_s for rescale in state.rescales[-3:] if rescale.stall_s is not None]
    steps_left = limits.steps - 1 - seen.step
    saved_s = share * lighter * (typical_step_s(seen.progress) or 0.0) * steps_left
    return saved_s > PAYS * max(stalls, default=GUESSED_STALL_S)
