"""How a run ends, and the checkpoints it leaves. Rules of `lifecycle`."""

from dataclasses import replace

from orchestrator.policy.crew import traceback_of, why_gone
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.moves import BLAME_S, MAX_FAILED_MOVES
from orchestrator.policy.run_state import Action, Commit, Decision, Note, Observation, RunState, ended
from orchestrator.protocol.messages import Finish, Phase, Report, ShardWritten
from orchestrator.protocol.status import RunPhase

BLAME_PEERS_S = 3.0  # how long "my peers are gone" may stand without anybody found dead
MAX_FAILED_SPAWNS = 3  # in a row
USER_ERROR = "user_error"  # a WorkerError's kind: another worker would fail in the same way
OUTCOMES = {Finish.CANCEL: RunPhase.CANCELLED, Finish.PAUSE: RunPhase.PAUSED}


def fail_run(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """End the run when it can't go on, with the cause by name.

    Peers of a dead worker complain before its death is known, so a complaint alone is given time to find its cause.
    """
    if seen.faults:
        return ended(state, RunPhase.FAILED, seen.faults[0])
    mistaken = [r.worker for r in seen.reports.values() if r.error is not None and r.error.kind == USER_ERROR]
    if mistaken and state.current is None:  # later it is a standby's that can't be taken in; training goes on
        worker = mistaken[0]
        return ended(state, RunPhase.FAILED, why_gone(seen, worker), traceback_of(seen, worker))
    if state.failed_spawns >= MAX_FAILED_SPAWNS:
        why = f"{state.failed_spawns} workers in a row ended early; {state.why}"
        return ended(state, RunPhase.FAILED, why, state.traceback)
    if state.failed_moves >= 2 * MAX_FAILED_MOVES:
        return ended(state, RunPhase.FAILED, f"{state.failed_moves} moves in a row failed; {state.why}")
    needed = state.needed
    dead = [worker for worker in needed if worker in seen.lost]
    if dead:
        why = f"{_whereabouts(state, seen, dead[0])}: {why_gone(seen, dead[0])}"
        notes = tuple(Note("worker_lost", {"worker": w, "why": why_gone(seen, w), "member": True}) for w in dead)
        over = ended(state, RunPhase.FAILED, why)
        return Decision(over.state, notes + over.actions)
    return _fail_on_complaints(state, seen, needed)


def ask_finish(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Turn a wish to cancel or to pause into a fence, a checkpoint and the end; at once if nothing was trained yet.

    Behind a raised fence the move is finished first: it can't be called back.
    """
    if state.target.finish is Finish.NO or state.finish is not Finish.NO or state.fence is not None:
        return Decision(state)
    if state.current is None:
        outcome = OUTCOMES[state.target.finish]
        return ended(state, outcome, state.target.reason or f"{outcome} before the first step")
    return Decision(replace(state, finish=state.target.finish, next=None, next_first_step=None, next_why=""))


def commit_checkpoint(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Have the oldest complete checkpoint marked whose shards have all been written."""
    if seen.committed > state.checkpoint_done:
        return Decision(replace(state, checkpoint_done=seen.committed))
    complete = _complete_checkpoints(state, seen)
    return Decision(state, tuple(complete[:1]))


def end_run(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Everybody has finished, the last checkpoint is marked and the last record received: the run is over."""
    reports = [seen.reports[w] for w in state.members if w in seen.reports]
    if not reports or len(reports) < len(state.members) or any(r.phase is not Phase.FINISHED for r in reports):
        return Decision(state)
    last_step = max(report.step for report in reports)
    if state.checkpoint_done < last_step or seen.progress.watermark < last_step:
        return Decision(state)
    if last_step + 1 >= limits.steps:
        return ended(state, RunPhase.SUCCEEDED, f"all {limits.steps} steps are done")
    if state.finish is not Finish.NO:
        outcome = OUTCOMES[state.finish]
        why = state.target.reason or str(outcome)
        return ended(state, outcome, f"{why}, after {last_step + 1} of {limits.steps} steps")
    return ended(state, RunPhase.FAILED, f"workers stopped after step {last_step} of {limits.steps}, unasked")


def _fail_on_complaints(state: RunState, seen: Observation, needed: tuple[str, ...]) -> Decision:
    complaints = [r for w in needed if (r := seen.reports.get(w)) is not None and r.phase is Phase.FAILED]
    if not complaints:
        return Decision(replace(state, symptom_s=None))
    if state.symptom_s is None:
        return Decision(replace(state, symptom_s=seen.now_s))
    causes = [r for r in complaints if not _is_symptom(r)]
    patience_s = BLAME_S if causes else BLAME_PEERS_S
    if seen.now_s - state.symptom_s < patience_s:
        return Decision(state)
    worker = (causes or complaints)[0].worker
    why = f"{_whereabouts(state, seen, worker)}: {why_gone(seen, worker)}"
    return ended(state, RunPhase.FAILED, why, traceback_of(seen, worker))


def _is_symptom(report: Report) -> bool:
    return report.error is not None and report.error.kind == "peer_lost"


def _whereabouts(state: RunState, seen: Observation, worker: str) -> str:
    if state.current is None:
        return "before the first step"
    return f"rank {state.current.world.rank_of(worker)} of generation {state.current.generation} after step {seen.step}"


def _complete_checkpoints(state: RunState, seen: Observation) -> list[Action]:
    """Checkpoints of the current and the previous generation whose every rank has written its shard, oldest first."""
    plans = {plan.generation: plan for plan in (state.previous, state.current) if plan}
    shards: dict[tuple[int, int], dict[int, ShardWritten]] = {}
    for report in seen.reports.values():
        for shard in report.shards:
            if shard.step > state.checkpoint_done and shard.generation in plans:
                shards.setdefault((shard.step, shard.generation), {})[shard.rank] = shard
    return [
        Commit(step, plans[generation].epoch, generation, tuple(by_rank[rank] for rank in sorted(by_rank)))
        for (step, generation), by_rank in sorted(shards.items())
        if sorted(by_rank) == list(range(plans[generation].world.size))
    ]
