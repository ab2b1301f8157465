"""Detection of failed members, and the abort of their generation. Rules of `lifecycle`.

A generation is aborted when a member is gone, stops by itself or hangs, or when a transition that has begun can't be
finished. Errors that members report are recorded, and members that don't stop in time are removed. Recovery follows in
`orchestrator.policy.recovery.recover`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from orchestrator.policy.health.budget import cause_of_loss
from orchestrator.policy.health.hangs import SILENT_WHEN_STOPPING_S, find_hung_member, is_silent
from orchestrator.policy.recovery.respond import respond
from orchestrator.policy.rescale.generation_plan import abandoned, is_blame_due, without_store
from orchestrator.policy.rescale.worker_pool import why_gone
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import WorkerFailure
from orchestrator.policy.state.run_state import Decision, KillWorker, Observation, RunState
from orchestrator.protocol.events.generations import GenerationAborted
from orchestrator.protocol.events.workers import WorkerLost
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.status import Recovery
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT, WorkerError

OTHERS = ("peer_lost", "doubtful")  # kinds of errors that aren't the fault of the worker that reports them
STOP_S = 3.0  # a member of an aborted generation that does not stop within this counts as hung


def notice_failures(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Abort a generation that can't continue: a member is gone, one stopped by itself, or the transition failed."""
    current = state.current
    if current is None:
        return Decision(state)
    if state.is_recovering:
        return _notice_broken_plan(state, seen)
    gone = {w: why for w in state.members if (why := why_gone(seen, w))}
    if not gone and (hanging := find_hung_member(state, seen)) is not None:
        gone = {hanging: f"{hanging} hangs: its peers have waited for it for {seen.idle_s:.0f} s"}
    stopped = [w for w in state.members if w not in gone and seen.report(w).transition.stopped == current.generation]
    broken, unsaved = _broken_behind_fence(state, seen), _unsaved_end(state, seen)
    if not (gone or stopped or broken or unsaved):
        return Decision(state)
    own = _own_errors(seen, stopped)
    errors = [f"{worker} failed: {error.kind}: {error.message}" for worker, error in own]
    first = next(iter([*gone.values(), *errors]), "")
    why = first or broken or unsaved or f"{', '.join(stopped)} can't reach a peer"
    newest = current.generation if state.next is None else state.next.generation
    over = replace(
        state,
        abort=replace(state.abort, generation=newest, since_s=seen.now_s),
        failures=state.failures.without_failed_spawns(state.num_spawned),
        why=why,
        transition=None,
    )
    if gone or stopped or unsaved:
        step = max([seen.step, *(seen.gone[member].step for member in state.members if member in seen.gone)])
        note = GenerationAborted(current.generation, step, why)
        cause = "storage" if unsaved and not first else "network"
        account = Recovery(current.generation, (), cause, current.world.size, 0, step, why)
        return Decision(replace(over, abort=replace(over.abort, account=account), traceback=""), (note,))
    return abandoned(over, seen, newest, why)


def hear_errors(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Record the errors that members of an aborted generation report, once each. They may arrive after the complaints
    of peers, which have no error of their own to write down first."""
    if not state.is_recovering or state.current is None or state.abort.account is None:
        return Decision(state)
    generation = state.current.generation
    known = {failure.worker for failure in state.failures.recent if failure.generation == generation}
    own = _own_errors(
        seen, (w for w in state.members if w not in known and seen.report(w).transition.stopped == generation)
    )
    if not own:
        return Decision(state)
    moment_s = seen.now_s if state.abort.since_s is None else state.abort.since_s  # one abort is one failure
    failures = tuple(WorkerFailure(w, seen.nodes.get(w, ""), e.kind, seen.step, moment_s, generation) for w, e in own)
    worker, error = own[0]
    is_culprit = state.abort.account.cause == "network" and all(w in state.worker_group for w in state.members)
    why = f"{worker} failed: {error.kind}: {error.message}" if is_culprit else state.why
    account = replace(state.abort.account, cause=error.kind, why=why) if is_culprit else state.abort.account
    recorded = state.failures.with_new(failures)
    traceback = error.traceback or state.traceback
    responded, notes = respond(
        limits,
        replace(state, abort=replace(state.abort, account=account), failures=recorded, why=why, traceback=traceback),
        seen,
        failures,
    )
    return Decision(responded, notes)


def remove_lost_members(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Drop members of an aborted generation that are gone or don't stop in time from the worker group."""
    if not state.is_recovering or state.abort.since_s is None:
        return Decision(state)
    gone = {w: why for w in state.worker_group if w in state.members and (why := why_gone(seen, w))}
    rest = [w for w in state.worker_group if w in state.members and w not in gone and not has_stopped(state, seen, w)]
    if state.next is not None:  # all had stopped when it was planned, and are in transition to it
        rest = []
    if seen.now_s - state.abort.since_s >= STOP_S:
        gone |= {w: f"{w} hung: it did not stop within {STOP_S:.0f} s of the generation's end" for w in rest}
    elif seen.now_s - state.abort.since_s >= SILENT_WHEN_STOPPING_S:
        silent = [w for w in rest if is_silent(seen, w, SILENT_WHEN_STOPPING_S)]
        gone |= {w: f"{w} did not answer after a peer failed" for w in silent}
    hung = [w for w in gone if w in rest or is_silent(seen, w)]
    if not gone:
        return Decision(state)
    failures = tuple(
        WorkerFailure(
            w, seen.nodes.get(w, ""), "hang" if w in hung else cause_of_loss(state, seen, w), seen.step, seen.now_s
        )
        for w in gone
    )
    notes = tuple(
        WorkerLost(failure.worker, gone[failure.worker], member=True, step=failure.step, cause=failure.cause)
        for failure in failures
    )
    remaining = replace(
        state,
        worker_group=tuple(w for w in state.worker_group if w not in gone),
        failures=state.failures.with_new(failures),
        why=next(iter(gone.values())),
    )
    remaining, responses = respond(limits, remaining, seen, failures)
    return Decision(remaining, (*notes, *responses, *(KillWorker(w) for w in hung)))


def restart_first(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Drop the plan of a first world (from the seed or a checkpoint) if a worker of it failed. `plan_next` makes
    another; if the worker found the checkpoint damaged, another one is searched first."""
    return _notice_broken_plan(state, seen) if state.current is None else Decision(state)


def has_stopped(state: RunState, seen: Observation, member: str) -> bool:
    """Whether the member has left the current generation and reports its holdings."""
    assert state.current is not None
    report = seen.report(member)
    waits = report.phase is Phase.READY and report.generation > state.current.generation
    return report.phase is Phase.STRANDED or waits


def _notice_broken_plan(state: RunState, seen: Observation) -> Decision:
    """Abandon the generation that is planned, while none trains, if one of its workers fails in transition, and free
    those that wait in it."""
    transition = state.transition
    if transition is None:
        return Decision(state)
    plan = transition.plan
    lost = [w for w in plan.involved if w not in state.worker_group or why_gone(seen, w)]
    failed = _failed_in(plan, seen)
    damage = [w for w, error in _own_errors(seen, failed) if error.kind == CHECKPOINT_CORRUPT]
    why = _could_not_reach(plan, damage, seen) if damage else without_store(state, seen)
    if not lost and not failed and not why:
        return Decision(state)
    if not lost and not why and not is_blame_due(state, seen):
        return Decision(replace(state, transition=transition.failing(seen.now_s)))
    why = why or (f"{', '.join(lost)} was lost" if lost else _could_not_reach(plan, failed, seen))
    abort = replace(state.abort, generation=plan.generation, since_s=seen.now_s)
    over = replace(state, abort=abort, transition=None, wants_restore=bool(damage))
    return abandoned(over, seen, plan.generation, why)


def _broken_behind_fence(state: RunState, seen: Observation) -> str:
    """Why the transition that the world has begun can't be finished; empty if it can, or none has begun."""
    if state.next is None or state.current is None:
        return ""
    begun = state.fence is not None or any(seen.phase(w) is not Phase.TRAINING for w in state.members)
    if not begun:
        return ""
    lost = [w for w in state.next.involved if w not in state.worker_group or why_gone(seen, w)]
    if lost:
        return f"{', '.join(lost)} was lost"
    failed = _failed_in(state.next, seen)
    return _could_not_reach(state.next, failed, seen) if failed else ""


def _unsaved_end(state: RunState, seen: Observation) -> str:
    """Why the run's end is not saved, and won't be by this generation: all members have finished and wait for the last
    checkpoint, which was abandoned. Empty if that isn't so."""
    if state.current is None or any(seen.phase(w) is not Phase.FINISHED for w in state.members):
        return ""
    step = max(seen.report(w).step for w in state.members)
    abandoned = (state.current.generation, step) in seen.abandoned
    return f"the checkpoint of step {step}, the last one, could not be completed" if abandoned else ""


def _failed_in(plan: GenerationPlan, seen: Observation) -> list[str]:
    """Workers that could not reach the generation."""
    return [w for w in plan.involved if seen.report(w).transition.failed_generation == plan.generation]


def _could_not_reach(plan: GenerationPlan, failed: Sequence[str], seen: Observation) -> str:
    error = seen.report(failed[0]).health.error
    why = f": {error.message}" if error is not None else ""
    return f"{', '.join(failed)} could not reach generation {plan.generation}{why}"


def _own_errors(seen: Observation, workers: Iterable[str]) -> list[tuple[str, WorkerError]]:
    """Errors of these workers that are their own: not a lost peer, nor a doubtful state received from others."""
    errors = [(worker, seen.report(worker).health.error) for worker in workers]
    return [(worker, error) for worker, error in errors if error is not None and error.kind not in OTHERS]
