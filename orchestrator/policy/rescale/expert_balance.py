"""Experts moved by their loads: a generation of the same members with another placement. Rules of `lifecycle`.

    balance_experts    on request, or when the gain is worth the stall -> plan g+1 -> (transition) READY -> activate
    measure_balance    steps before and after -> share of a step's time that follows the load of the busiest rank

How much of a step waits for the busiest rank is not known before the first change. From the second on it is measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

from orchestrator.policy.rescale.generation_plan import MAX_FAILED_TRANSITIONS, can_plan, nodes_of, planned_transition
from orchestrator.policy.rescale.load_placement import (
    LEAST_GAIN,
    lighter,
    num_moved,
    placed_by_load,
    violation_of,
)
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import typical_step_s
from orchestrator.policy.state.run_parts import Rebalance
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange
from orchestrator.protocol.events.training import ExpertsKept, RebalanceMeasured
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.moe.experts import BY_LOAD

LEAST_ON_REQUEST = 0.05  # as `LEAST_GAIN`, on request: balanced routers leave as much uneven from batch to batch
KNOWN_STEPS = 20  # of a generation, before its placement is judged
GUESSED_SHARE = 0.5  # of a step's time that follows the busiest rank's load, until it was measured
LEAST_SHARE = 0.02  # that a measurement may give: a larger gain is tried all the same
GUESSED_STALL_S = 1.0
PAYS = 2.0  # times its stall that a change must save
LASTS = 4.0  # times the steps of the present placement that the next one is expected to stay good
MEASURED_STEPS = 12  # of a generation, from which the duration of its steps is taken


def balance_experts(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a generation whose experts are placed by load, if it was asked for or pays. A request counts as applied once
    that generation is active."""
    asked = state.target.rebalances > state.balance.requests
    if not (asked or limits.placement.policy == BY_LOAD) or not can_plan(state, seen) or state.current is None:
        return Decision(state)
    nodes, was = nodes_of(seen, state.members), state.current.placement
    before = violation_of(limits, seen, was, nodes)
    fails = state.failures.transitions >= MAX_FAILED_TRANSITIONS
    if not asked and (fails or not _is_known(state, seen) or not _pays(limits, state, seen, before, 0.0)):
        return Decision(state)
    placement = placed_by_load(limits, seen, was, nodes)
    after = violation_of(limits, seen, placement, nodes)
    if asked and (why := _why_not(limits, seen, before, after, fails)):
        heard = replace(state, balance=replace(state.balance, requests=state.target.rebalances))
        return Decision(heard, (ExpertsKept(seen.step, before, why, state.target.rebalances),))
    if not asked and not _pays(limits, state, seen, before, after):
        return Decision(state)
    moved = num_moved(limits, seen, was, placement)
    rebalance = Rebalance(state.num_generations, before, after, moved, state.target.rebalances)
    why = "experts are placed by load" + " as asked" * asked
    change = SizeChange(len(state.members), None)
    return planned_transition(limits, state, seen, state.members, change, why, placement, rebalance)


def measure_balance(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Compare steps before and after the newest change of the placement, if they are of one stage of the curriculum."""
    newest = state.balance.unmeasured
    if newest is None:
        return Decision(state)
    after = [r for r in seen.progress.recent if r.generation == newest.generation]
    if len(after) < MEASURED_STEPS:
        return Decision(state)
    here = after[-1]
    before = [
        r
        for r in seen.progress.recent
        if r.generation < newest.generation and (r.world_size, r.batch.stage) == (here.world_size, here.batch.stage)
    ][-MEASURED_STEPS:]
    measured = replace(state, balance=replace(state.balance, unmeasured=None))
    if len(before) < MEASURED_STEPS or any(r.batch.stage != here.batch.stage for r in after):
        return Decision(measured)
    before_s, after_s = (median(r.timing.step_s for r in records) for records in (before, after))
    note = RebalanceMeasured(newest.generation, seen.step, before_s, after_s)
    gain = lighter(_violation(before), _violation(after))
    if gain < LEAST_GAIN or before_s <= 0:  # loads have changed: it says nothing on what even ones would gain
        return Decision(measured, (note,))
    known = state.balance.share
    found = min(max((1 - after_s / before_s) / gain, LEAST_SHARE), 1.0)
    share = found if known is None else (known + found) / 2
    return Decision(replace(measured, balance=replace(measured.balance, share=share)), (note,))


def _violation(records: Sequence[StepRecord]) -> float:
    """The mean of what the workers measured."""
    return fmean(r.routing.experts.rank_violation or 0.0 for r in records)


def _is_known(state: RunState, seen: Observation) -> bool:
    """Whether loads are known, and the present generation has done enough steps to judge its placement."""
    return seen.progress.loads.is_known and _num_trained(state, seen) >= KNOWN_STEPS


def _num_trained(state: RunState, seen: Observation) -> int:
    """Steps of the present generation, as far as they are known."""
    return sum(r.generation == state.activated for r in seen.progress.recent)


def _why_not(limits: RunLimits, seen: Observation, before: float, after: float, fails: bool) -> str:
    """Why a request moves no expert; empty if it does."""
    if fails:
        return "the newest changes of the workers or of the placement have failed"
    if seen.step + 1 >= limits.steps:
        return "the run is at its end"
    if lighter(before, after) < LEAST_ON_REQUEST:
        return f"the busiest worker has {1 + before:.2f} times the mean load, and no placement lowers that by 5 %"
    return ""


def _pays(limits: RunLimits, state: RunState, seen: Observation, before: float, after: float) -> bool:
    """Whether the steps for which it is expected to stay good get shorter by more than the stall."""
    gain = lighter(before, after)
    if gain < LEAST_GAIN:
        return False
    share = GUESSED_SHARE if state.balance.share is None else state.balance.share
    stalls = [rescale.stall_s for rescale in state.rescales[-3:] if rescale.stall_s is not None]
    num_steps = min(limits.steps - 1 - seen.step, LASTS * _num_trained(state, seen))
    saved_s = share * gain * (typical_step_s(seen.progress) or 0.0) * num_steps
    return saved_s > PAYS * max(stalls, default=GUESSED_STALL_S)
