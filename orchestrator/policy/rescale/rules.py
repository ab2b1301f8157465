"""Transition from one generation to the next: prepare, fence, move, activate.

Each function is a rule of `lifecycle`: it takes a state and an observation and returns a decision; a rule that has
nothing to do returns the state unchanged. During a transition every member of the old world keeps its old shard, so
until the activation is journalled the old world can always be rebuilt (`recovery`).
"""

from dataclasses import replace
from typing import TypeVar

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.policy.health.stragglers import is_to_be_replaced
from orchestrator.policy.rescale.generation_plan import (
    abandoned,
    can_plan,
    is_blame_due,
    members_for,
    node_by_node,
    nodes_of,
    planned_transition,
    warm_standbys,
    with_change_at,
    with_plan,
    without_store,
)
from orchestrator.policy.rescale.horizon import horizon_steps
from orchestrator.policy.rescale.keeper import is_connecting
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.expert_changes import ExpertChanges, experts_at
from orchestrator.policy.state.progress import stall_s
from orchestrator.policy.state.run_parts import ExpertBalance, Rebalance
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange, next_change, request_holds, wanted_size
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.generations import Activated, Recovered, Rescaled
from orchestrator.protocol.events.training import ExpertsChanged, ExpertsRebalanced
from orchestrator.protocol.messages import Fence, GenerationPlan
from orchestrator.protocol.status import Recovery, Rescale
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Handover
from orchestrator.sampling.micro_batches import UNSAID

Change = TypeVar("Change", Rescale, Recovery)

MOST_REBALANCES = 32  # in a run's state, which is journalled at each change


def plan_next(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan the generation that is due, as soon as enough standbys are warm for it."""
    if state.current is None:
        return _plan_first(limits, state, seen)
    if not can_plan(state, seen):
        return Decision(state)
    change = next_change(
        limits, state.size_request, len(state.members), seen.step, horizon_steps(seen), state.queue.grant
    )
    if change is None and is_to_be_replaced(limits, state):
        return _plan_replacement(limits, state, seen)
    members = members_for(state, seen, change.workers) if change else None
    if change is None or members is None or _is_behind_experts(state, change):
        return Decision(state)
    why = f"scheduled for step {change.first_step}" if change.first_step is not None else _why(limits, state, seen)
    return planned_transition(limits, state, seen, members, change, why)


def abandon_transition(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Drop the next generation if a newcomer fails, or can't connect, before the fence: training continues."""
    transition = state.transition
    if transition is None or state.current is None or transition.fence is not None or state.is_recovering:
        return Decision(state)
    plan = transition.plan
    if any(seen.phase(member) is not Phase.TRAINING for member in state.members):
        return Decision(state)
    involved = plan.involved
    known = [f"{w} was lost" for w in involved if w not in state.worker_group]
    known += [why] if (why := without_store(state, seen)) else []
    broken = known + [
        f"{w} could not reach generation {plan.generation}"
        for w in involved
        if seen.report(w).transition.failed_generation == plan.generation
    ]
    if not broken:
        return Decision(state)
    if not known and not is_blame_due(state, seen):
        return Decision(replace(state, transition=transition.failing(seen.now_s)))
    is_fit = plan.world.members == state.members  # the same members with other micro-batches: no request to drop
    return abandoned(replace(state, transition=None), seen, plan.generation, broken[0], keeps_request=is_fit)


def raise_fence(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Set the fence that ends the current generation, once all involved workers are connected for the next one.

    The first generation needs no fence: no worker trains before it.
    """
    transition = state.transition
    if transition is None or state.current is None or transition.fence is not None or state.is_recovering:
        return Decision(state)
    generation = transition.plan.generation
    if not all(seen.report(worker).transition.prepared >= generation for worker in state.involved):
        return Decision(state)
    fence = Fence(generation, at_step=None if transition.first_step is None else transition.first_step - 1)
    return Decision(replace(state, transition=replace(transition, fence=fence)))


def activate(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Make the next generation the current one, once every member of it holds its shard.

    From here on the old shards may be dropped. The event is journalled before any worker receives the directive.
    """
    if state.transition is None:
        return Decision(state)
    plan = state.transition.plan
    if not all(_is_ready(seen, member, plan.generation) for member in plan.world.members):
        return Decision(state)
    old = state.current.world if state.current else None
    moved_bytes, state_identical = _handed_over(state, seen)
    rebalance, change = state.transition.rebalance, plan.change
    rescale = Rescale(
        generation=plan.generation,
        from_size=old.size if old else 0,
        to_size=plan.world.size,
        step=seen.step,
        why=state.transition.why,
        moved_bytes=moved_bytes,
        state_identical=state_identical,
        experts_moved=None if rebalance is None else rebalance.num_moved,
        experts=None if change is None else (change.num_before, change.num_experts),
    )
    is_other = old is not None and (old.members != plan.world.members or rebalance is not None or change is not None)
    moved = is_other and state.abort.account is None
    recoveries = state.recoveries
    if state.abort.account is not None:
        account = replace(
            state.abort.account,
            generation=plan.generation,
            to_size=plan.world.size,
            moved_bytes=moved_bytes,
            state_identical=state_identical,
        )
        recoveries = (*recoveries, account)
    activated = replace(
        state,
        previous=state.current,
        current=plan,
        activated=plan.generation,
        transition=None,
        failures=replace(
            state.failures.without_failed_spawns(),
            transitions=0 if moved or state.abort.account is not None else state.failures.transitions,
        ),
        abort=replace(state.abort, since_s=None, account=None),
        recoveries=recoveries,
        queue=replace(state.queue, since_s=None, begun_s=seen.now_s if state.current is None else state.queue.begun_s),
        micro_batch=replace(state.micro_batch, size=UNSAID),
        rescales=_with(state.rescales, rescale) if moved else state.rescales,
        experts=_experts(state, plan, _fence_step(plan, seen)),
        balance=_balance(state, rebalance, is_same_size=old is not None and old.size == plan.world.size),
    )
    event = Activated(**vars(rescale), members=plan.world.members)
    notes = _notes(plan, rebalance, _fence_step(plan, seen))
    return Decision(activated, (_with_times(event, plan, seen), *notes))


def measure_stalls(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Add the measured stall to the newest rescales and recoveries, once the new world has done a few steps."""
    rescales = tuple(_measured(limits, state, seen, rescale) for rescale in state.rescales)
    recoveries = tuple(_measured(limits, state, seen, recovery) for recovery in state.recoveries)
    notes: list[Event] = [Rescaled(**vars(r)) for r in rescales if r not in state.rescales]
    notes += [Recovered(**vars(r)) for r in recoveries if r not in state.recoveries]
    if not notes:
        return Decision(state)
    return Decision(replace(state, rescales=rescales, recoveries=recoveries), tuple(notes))


def settle(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Mark the current generation settled once it has committed a step of its own, and its keeper has a snapshot, if it
    gets one: older state may be dropped."""
    settled = max((seen.report(w).protection.settled for w in state.members), default=-1)
    if state.current is None or settled <= state.settled or settled < state.current.generation:
        return Decision(state)
    return Decision(state if is_connecting(state, seen) else replace(state, settled=settled))


def _plan_first(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    if state.next is not None or state.is_ending or state.wants_restore or seen.store_address is None:
        return Decision(state)
    size = wanted_size(limits, state.size_request, seen.step + 1, state.queue.grant)
    members = node_by_node(seen, warm_standbys(state, seen)[:size])
    if not size or len(members) < size:
        return Decision(state)
    world, nodes = World(state.num_generations, members), nodes_of(seen, members)
    first_step = state.restore.step + 1 if state.restore else 0
    before, made = experts_at(limits, state.experts, first_step - 1), state.experts.newest_until(first_step - 1)
    state, change = with_change_at(limits, state, seen, first_step, before, made)
    num_experts = before.num_experts if change is None else change.num_experts
    placement = ExpertPlacement.balanced(num_experts, size, nodes)
    why = f"continues after step {state.restore.step}" if state.restore else "the run starts"
    return with_plan(limits, state, seen, world, placement, None, SizeChange(size, None), why, experts=change)


def _is_behind_experts(state: RunState, change: SizeChange) -> bool:
    """Whether other experts come before a scheduled size: members wait there for them, and for no fence behind it."""
    until = state.current.until_step if state.current is not None else None
    return until is not None and change.first_step is not None and change.first_step > until


def _plan_replacement(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan the same world with a standby in place of the slow member, once one is warm."""
    standbys = warm_standbys(state, seen)
    if not standbys:
        return Decision(state)
    members = tuple(standbys[0] if worker == state.straggler else worker for worker in state.members)
    why = f"{state.straggler} is much slower than the others"
    return planned_transition(limits, state, seen, members, SizeChange(len(members), None), why)


def _why(limits: RunLimits, state: RunState, seen: Observation) -> str:
    step = seen.step + 1
    by_request = state.size_request is not None and request_holds(limits, state.size_request, step)
    due = (
        [state.size_request.since_step]
        if by_request and state.size_request
        else [e.at_step for e in limits.schedule if e.at_step <= step]
    )
    is_held = wanted_size(limits, state.size_request, step, state.queue.grant) < wanted_size(
        limits, state.size_request, step
    )
    if is_held or state.queue.granted_since > max(due, default=0):
        return state.queue.grant.why
    return (state.target.reason or "asked for") if by_request else "scheduled"


def _measured(limits: RunLimits, state: RunState, seen: Observation, change: Change) -> Change:
    if change.stall_s is not None:
        return change
    is_past = change.generation != state.activated or seen.progress.watermark + 1 >= limits.steps
    return replace(change, stall_s=stall_s(seen.progress, change.generation, is_past))


def _is_ready(seen: Observation, worker: str, generation: int) -> bool:
    report = seen.report(worker)
    return report.phase is Phase.READY and report.generation == generation


def _with(rescales: tuple[Rescale, ...], newest: Rescale) -> tuple[Rescale, ...]:
    """With the newest one; of those that moved experts by load only the newest `MOST_REBALANCES` are kept."""
    moves = [rescale.generation for rescale in rescales if rescale.experts_moved]
    left_out = moves[: len(moves) - MOST_REBALANCES + 1] if len(moves) >= MOST_REBALANCES else []
    return (*(rescale for rescale in rescales if rescale.generation not in left_out), newest)


def _balance(state: RunState, rebalance: Rebalance | None, is_same_size: bool) -> ExpertBalance:
    """What is known of placements once a generation is active."""
    requests = state.balance.requests if rebalance is None else max(state.balance.requests, rebalance.request)
    return ExpertBalance(requests, rebalance, state.balance.share if is_same_size else None)


def _fence_step(plan: GenerationPlan, seen: Observation) -> int:
    """The step after which a generation begins, by its members."""
    handovers = (h for worker in plan.world.members for h in seen.report(worker).transition.handovers)
    return max((h.step for h in handovers if h.generation == plan.generation), default=seen.step)


def _experts(state: RunState, plan: GenerationPlan, step: int) -> ExpertChanges:
    """What is decided on the number of experts once a generation is active, which begins after `step`."""
    changes = state.experts
    if plan.change is None:
        origin = plan.source.world.generation if plan.source is not None else None
        made = changes.newest_until(step) if origin is None else changes.made_by(origin)
        return changes.with_made(plan.generation, made)
    requests = max(changes.requests, plan.change.request)
    # A new change replaces later ones, of a past that the run has left; a decided one may be late.
    is_new, last = plan.change.first_step < 0, plan.change.first_step
    kept = tuple(c for c in changes.decided if (c.first_step <= step if is_new else c.first_step != last))
    decided = replace(changes, decided=kept).with_new(replace(plan.change, first_step=step + 1))
    return replace(changes, requests=requests, decided=decided).with_made(plan.generation, step + 1)


def _notes(plan: GenerationPlan, rebalance: Rebalance | None, step: int) -> tuple[Event, ...]:
    """Events of what a generation changes of the experts."""
    notes: list[Event] = []
    if rebalance is not None:
        notes.append(ExpertsRebalanced(**vars(rebalance) | {"step": step}))
    if (change := plan.change) is not None:
        notes.append(ExpertsChanged(plan.generation, step, change.num_before, change.num_experts, change.request))
    return tuple(notes)


def _with_times(event: Activated, plan: GenerationPlan, seen: Observation) -> Activated:
    """The event with the seconds per part of the member that took longest: of one member, so that they add up."""
    handovers = [
        handover
        for worker in plan.world.members
        for handover in seen.reports[worker].transition.handovers
        if handover.generation == plan.generation
    ]
    if not handovers:
        return event
    longest = max(handovers, key=lambda h: h.connect_s + h.build_s + h.transfer_s + h.digest_s)
    return replace(
        event,
        connect_s=longest.connect_s,
        build_s=longest.build_s,
        transfer_s=longest.transfer_s,
        digest_s=longest.digest_s,
    )


def _handed_over(state: RunState, seen: Observation) -> tuple[int, bool | None]:
    """Bytes moved between workers, and whether every digest taken was equal before and after; None without digests."""
    assert state.next is not None
    handovers: list[Handover] = [
        handover
        for worker in state.involved
        if worker in seen.reports
        for handover in seen.reports[worker].transition.handovers
        if handover.generation == state.next.generation
    ]
    verdicts = [h.state_identical for h in handovers if h.state_identical is not None]
    return sum(h.received_bytes for h in handovers), all(verdicts) if verdicts else None
