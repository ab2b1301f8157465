"""The lifecycle of a run as a pure function: from the state and an observation to the next state and actions.

    start    spawn workers -> all warm -> plan generation 0 -> all READY -> activate
    rescale  warm standbys -> plan g+1 -> all connected -> fence -> all READY -> activate
    mend     a newcomer fails in transition -> the old world continues, or is rebuilt from its own shards
    recover  a member fails -> all stop -> plan g+1 from the survivors' state -> all READY -> activate
    go back  no state is left -> plan g+1 from a checkpoint -> a rank finds damage -> plan g+2 from another one
    preempt  all FINISHED, checkpoint marked -> empty worker group, queued -> start from the checkpoint
    end      all FINISHED, last checkpoint marked -> succeeded or stopped

The controller calls `decide` at every change, journals the new state, ensures that `state.worker_group` exists and
sends `directive_of(state)` to every worker. A call with nothing to do returns the same state, so `decide` may be called
at any time, also by a successor that has only the journalled state.
"""

from collections.abc import Callable
from dataclasses import replace

from orchestrator.policy.curriculum import decide_stages
from orchestrator.policy.health.budget import FREE_SPAWNS, spawns_held_back_s
from orchestrator.policy.health.checkpoint_interval import choose_checkpoint_interval
from orchestrator.policy.health.leaving import leavers
from orchestrator.policy.health.stragglers import watch_stragglers
from orchestrator.policy.recovery.detect import hear_errors, notice_failures, remove_lost_members, restart_first
from orchestrator.policy.recovery.recover import recover, restore_another
from orchestrator.policy.replay_check import watch_checks
from orchestrator.policy.rescale.draining import plan_departure, watch_drains, why_leaving
from orchestrator.policy.rescale.expert_balance import balance_experts, measure_balance
from orchestrator.policy.rescale.expert_number import change_experts
from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.rescale.keeper import choose_keeper
from orchestrator.policy.rescale.micro_batch import fit_micro_batches
from orchestrator.policy.rescale.rules import (
    abandon_transition,
    activate,
    measure_stalls,
    plan_next,
    raise_fence,
    settle,
)
from orchestrator.policy.rescale.worker_pool import (
    apply_target,
    hold_worker_group,
    quarantine_nodes,
    remove_lost_workers,
)
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import heed_grant, heed_priority
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import wanted_size
from orchestrator.policy.termination import ask_finish, commit_checkpoint, end_run, fail_run
from orchestrator.protocol.messages import DesiredRunState, Directive, FinishMode
from orchestrator.protocol.scaling import UNLIMITED
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase

Rule = Callable[[RunLimits, RunState, Observation], Decision]

RULES: tuple[Rule, ...] = (
    apply_target,
    heed_grant,
    heed_priority,
    watch_drains,
    fail_run,
    measure_stalls,
    commit_checkpoint,
    choose_checkpoint_interval,
    end_run,
    settle,
    notice_failures,
    hear_errors,
    remove_lost_members,
    remove_lost_workers,
    restore_another,
    restart_first,
    abandon_transition,
    activate,
    recover,
    ask_finish,
    change_experts,
    plan_departure,
    plan_next,
    measure_balance,
    balance_experts,
    fit_micro_batches,
    raise_fence,
    decide_stages,
    watch_stragglers,
    quarantine_nodes,
    hold_worker_group,
    choose_keeper,
    watch_checks,
)


def first_state(limits: RunLimits) -> RunState:
    """The state of a newly submitted run."""
    return RunState(target=DesiredRunState(seq=0, workers=limits.initial_workers))


def decide(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Apply every rule once, in order. Rules see what the ones before them decided."""
    decision = Decision(state)
    for rule in RULES:
        if decision.state.outcome is not None:
            break
        step = rule(limits, decision.state, seen)
        decision = Decision(step.state, decision.actions + step.actions)
    if directive_of(decision.state, 0, 0) != directive_of(state, 0, 0):
        return Decision(replace(decision.state, seq=state.seq + 1), decision.actions)
    return decision


def directive_of(state: RunState, term: int, seq: int | None = None, journalled: int = -1) -> Directive:
    """The directive for every worker of the run; `seq` is the state's unless given."""
    return Directive(
        term=term,
        seq=state.seq if seq is None else seq,
        current=state.current,
        next=state.next,
        fence=state.fence,
        activated=state.activated,
        aborted=state.abort.generation,
        settled=state.settled,
        finish=state.finish,
        checkpoint_done=state.checkpoint_done,
        checkpoint_generation=state.checkpoint_generation,
        checkpoint_interval_s=state.checkpoint_interval.seconds,
        checkpoint_from=state.target.checkpoint if state.target.checkpoint > state.checkpoint_done else -1,
        stages=state.curriculum.stages,
        stages_version=state.curriculum.version,
        check=state.replay.task,
        keepers=state.keeping.chosen,
        journalled=journalled,
    )


def phase_of(state: RunState, seen: Observation) -> RunPhase:
    """The run's phase. RESCALING only while training waits for the transition."""
    if state.outcome is not None:
        return state.outcome
    if state.is_queued:
        return RunPhase.QUEUED
    if state.is_recovering or (state.current is None and state.abort.account is not None):
        return RunPhase.RECOVERING
    if state.current is None:
        return RunPhase.STARTING
    if state.gives_way:
        return RunPhase.RESCALING
    if state.finish is not FinishMode.NO or all(seen.phase(w) is Phase.FINISHED for w in state.members):
        return RunPhase.FINISHING
    stopped = (Phase.MOVING, Phase.READY, Phase.STRANDED)
    if state.next is not None and any(seen.phase(w) in stopped for w in state.members):
        return RunPhase.RESCALING
    return RunPhase.TRAINING


def explain(limits: RunLimits, state: RunState, seen: Observation) -> str:
    """One sentence on what the run waits for, or how it ended."""
    if state.outcome is not None:
        return state.why
    if state.gives_way:
        return f"preempted: checkpoints at the next fence, releases its workers, resumes later: {state.queue.grant.why}"
    if state.is_ending:
        return "ends at the next fence with a checkpoint"
    if seen.unreadable:
        return f"{state.why}; {seen.unreadable}"
    if state.is_recovering and state.next is None:
        return _explain_recovery(limits, state, seen)
    if state.transition is not None:
        plan = state.transition.plan
        return f"generation {plan.generation} with {plan.world.size} workers: {state.transition.why}"
    if state.current is not None and state.current.until_step == seen.step + 1 < limits.steps:
        return (
            f"waits before step {seen.step + 1}, which other experts do, for the averages that decide which ones stay"
        )
    if leaving := [w for w in leavers(state, seen) if w in state.members]:
        return f"{why_leaving(state, seen, leaving)}; waits for others to take over" + _failed_spawns(state, seen)
    if state.is_queued:
        return f"queued: {state.queue.grant.why}"
    asked, wanted = (
        wanted_size(limits, state.size_request, seen.step + 1, grant) for grant in (UNLIMITED, state.queue.grant)
    )
    held = f", {wanted} of {asked}: {state.queue.grant.why}" * (wanted < asked)
    missing = wanted - len(state.members) - len(warm_standbys(state, seen))
    if missing <= 0:
        slow = f"; {state.straggler} is much slower than the others" * (state.straggler in state.members)
        trains = f"as many workers train as are {'granted' if held else 'wanted'}{held or f': {wanted}'}"
        return (trains if state.current else "all workers are warm") + slow
    unplaced = sum(worker not in seen.reports for worker in state.worker_group)
    avoided = f"; nodes quarantined after failures: {len(state.failures.quarantine)}" * bool(state.failures.quarantine)
    placed = (f"; {unplaced} have no place yet" + avoided) * bool(unplaced)
    waits = f"waits for {missing} of {wanted} workers to get warm" + placed + f"; granted{held}" * bool(held)
    return waits + _failed_spawns(state, seen)


def _failed_spawns(state: RunState, seen: Observation) -> str:
    """On workers that failed before they were warm, and when the next ones start; empty if they aren't held back."""
    is_urgent = any(worker in state.members for worker in leavers(state, seen))
    delay_s = spawns_held_back_s(state.failures, seen.now_s, is_urgent)
    if state.failures.attempts <= FREE_SPAWNS or delay_s <= 0:
        return ""
    failed = f"the last {state.failures.spawns} ended before they were warm"
    return f"; {failed}, the next start in {delay_s:.0f} s: {state.why}"


def _explain_recovery(limits: RunLimits, state: RunState, seen: Observation) -> str:
    survivors = [w for w in state.members if w in state.worker_group]
    there = len(survivors) + len(warm_standbys(state, seen))
    missing = limits.min_workers - there
    if missing > 0:
        more = f"{missing} more worker" + "s" * (missing > 1)
        there_are = f"{there} {'is' if there == 1 else 'are'} there"
        waits = f"{state.why}; waits for {more}: {there_are}, workers.min is {limits.min_workers}"
        delay_s = spawns_held_back_s(state.failures, seen.now_s)
        return waits + f"; after repeated failures the next worker starts in {delay_s:.0f} s" * (delay_s > 0)
    if seen.store_address is None:
        return f"{state.why}; waits for the rendezvous store to come back"
    return f"{state.why}; waits until {', '.join(survivors) or 'every member'} has stopped"
