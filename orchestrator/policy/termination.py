"""End of a run, and completion of its checkpoints. Rules of `lifecycle`."""

from dataclasses import replace

from orchestrator.policy.rescale.generation_plan import MAX_FAILED_TRANSITIONS
from orchestrator.policy.rescale.worker_pool import lacks_members, traceback_of, why_gone
from orchestrator.policy.state.checkpoint_parts import complete_checkpoints
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.requests import suspended
from orchestrator.policy.state.run_state import USER_ERROR, Decision, Observation, RunState, ended
from orchestrator.protocol.messages import FinishMode
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_phase import Phase

MAX_FAILED_SPAWNS = 3  # in a row
OUTCOMES = {FinishMode.STOP: RunPhase.STOPPED, FinishMode.STOP_NOW: RunPhase.STOPPED, FinishMode.PAUSE: RunPhase.PAUSED}


def fail_run(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """End the run when it can't continue, with the cause."""
    if seen.faults:
        return ended(state, RunPhase.FAILED, seen.faults[0])
    mistaken = [
        r.worker for r in seen.reports.values() if r.health.error is not None and r.health.error.kind == USER_ERROR
    ]
    if mistaken and state.current is None:  # later it is a standby's that can't join, and training continues
        worker = mistaken[0]
        return ended(state, RunPhase.FAILED, why_gone(seen, worker), traceback_of(seen, worker))
    if state.failures.spawns >= MAX_FAILED_SPAWNS and lacks_members(limits, state, seen):
        why = f"{state.failures.spawns} workers in a row ended early; {state.why}"
        return ended(state, RunPhase.FAILED, why, state.traceback)
    if state.failures.transitions >= 2 * MAX_FAILED_TRANSITIONS:
        return ended(state, RunPhase.FAILED, f"{state.failures.transitions} transitions in a row failed; {state.why}")
    return _fail_while_beginning(state, seen)


def ask_finish(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Turn a request to stop or to pause into a fence, a checkpoint and the end; at once if nothing was trained yet.
    A preempted run stops in the same way, to resume later.

    Behind a raised fence the transition is finished first, as it can't be undone. The run ends at once where no live
    workers hold a whole state and checkpoints can't be read, or if it was asked to: then without a checkpoint.
    """
    if state.target.finish is FinishMode.STOP_NOW and state.current is not None:
        newest = f"the newest one is of step {state.checkpoint_done}" if state.checkpoint_done >= 0 else "there is none"
        why = (
            f"{state.target.reason}, after {seen.progress.watermark + 1} of {limits.steps} steps, without a checkpoint"
        )
        return ended(state, RunPhase.STOPPED, f"{why}: {newest}")
    is_lost = state.wants_restore and bool(seen.unreadable)
    if state.target.finish is not FinishMode.NO and (state.current is None or is_lost):
        outcome = OUTCOMES[state.target.finish]
        done = f"after step {state.restore.step}" if state.restore else "before the first step"
        done = f"while {seen.unreadable}" if is_lost else done
        why = state.target.reason or f"{outcome} {done}"
        lacks = seen.progress.watermark - (state.restore.step if state.restore else -1)
        if lacks > 0 and not is_lost:
            why += f", on its way back to a checkpoint that lacks {lacks} published steps: a resume does them again"
        return ended(state, outcome, why)
    asked = FinishMode.PAUSE if state.gives_way else state.target.finish
    if asked is FinishMode.NO or state.finish is not FinishMode.NO or state.fence is not None:
        return Decision(state)
    if state.is_recovering:  # the world that will end is still being formed
        return Decision(replace(state, finish=asked))
    return Decision(replace(state, finish=asked, transition=None))


def commit_checkpoint(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Commit the oldest checkpoint whose shards are all written, once the records of its steps are journalled: a run
    that goes back to it needs the records of the steps before.
    """
    if seen.checkpointed > state.checkpoint:
        generation, step = seen.checkpointed
        return Decision(replace(state, checkpoint_done=step, checkpoint_generation=generation))
    complete = complete_checkpoints(state, seen)
    if not complete or complete[0].step > seen.progress.watermark:
        return Decision(state)
    return Decision(state, (complete[0],))


def end_run(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """End the run once all members have finished, the last checkpoint is marked and the last record received."""
    if state.current is None or any(seen.phase(w) is not Phase.FINISHED for w in state.members):
        return Decision(state)
    last_step = max(seen.report(w).step for w in state.members)
    if state.checkpoint < (state.current.generation, last_step) or seen.progress.watermark < last_step:
        return Decision(state)
    if last_step + 1 >= limits.steps:
        return ended(state, RunPhase.SUCCEEDED, f"all {limits.steps} steps are done")
    if state.target.finish is not FinishMode.NO:
        outcome = OUTCOMES[state.target.finish]
        why = state.target.reason or str(outcome)
        return ended(state, outcome, f"{why}, after {last_step + 1} of {limits.steps} steps")
    if state.gives_way:
        return suspended(state, seen)
    return ended(state, RunPhase.FAILED, f"workers stopped after step {last_step} of {limits.steps} without request")


def _fail_while_beginning(state: RunState, seen: Observation) -> Decision:
    """End the run if a worker fails, by more than a lost peer, while the first world is made: others would fail too."""
    planned = state.next.world.members if state.next is not None and state.current is None else ()
    failed = [w for w in planned if w not in seen.lost and seen.phase(w) is Phase.FAILED]
    if not failed:
        return Decision(state)
    why = f"before the first step: {why_gone(seen, failed[0])}"
    return ended(state, RunPhase.FAILED, why, traceback_of(seen, failed[0]))
