"""What a run does when somebody in its world is lost. Rules of `lifecycle`.

    notice   a member is gone, or has stopped, or a move behind its fence is broken -> the generation is aborted
    recover  all survivors have stopped -> the newest complete state -> plan g+1 from it -> (moves) READY -> activate

The ladder: a rank's own memory, its buddy's snapshot, the newest checkpoint, the one before. Survivors go on at once
with as many as are left, if that is enough; whoever replaces the lost ones joins at a later fence.
"""

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.elastic.cut import Cut, Holding, newest_cut, placement_of_cut, world_of
from orchestrator.elastic.placement import Placement
from orchestrator.elastic.world import World
from orchestrator.policy.crew import why_gone
from orchestrator.policy.detection import SILENT_WHEN_STOPPING_S, is_silent, stuck
from orchestrator.policy.failures import MAX_LOSSES, PLACE, cause_of_loss, held_back_s, overdrawn
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.planning_moves import MAX_FAILED_MOVES, is_blame_due, warm_standbys, with_plan, without_store
from orchestrator.policy.responses import respond
from orchestrator.policy.run_state import USER_ERROR, Decision, Dismiss, Loss, Note, Observation, RunState, ended
from orchestrator.policy.schedule import SizeChange, Wish, wanted_size
from orchestrator.protocol.messages import Phase, Source, WorkerError
from orchestrator.protocol.status import Recovery, RunPhase

STOP_S = 3.0  # a member whose generation was aborted stops within this, or is taken for hung
MAX_USER_ERRORS = 2  # in the same step: then it is no accident
MAX_FRUITLESS = 5  # recoveries in a row after which no step was done


def notice_loss(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """End a generation that can't go on: a member is gone, one has stopped by itself, or the move from it is broken."""
    current = state.current
    if current is None:
        return Decision(state)
    if state.is_recovering:
        return _notice_broken_recovery(state, seen)
    gone = {w: why for w in state.members if (why := why_gone(seen, w))}
    if not gone and (hanging := stuck(state, seen)) is not None:
        gone = {hanging: f"{hanging} hangs: its peers have waited for it for {seen.idle_s:.0f} s"}
    stopped = [w for w in state.members if w not in gone and _stopped_in(seen, w) == current.generation]
    broken = _broken_behind_fence(state, seen)
    if not gone and not stopped and not broken:
        return Decision(state)
    own = _own_errors(seen, stopped)
    told = [f"{worker} failed: {error.kind}: {error.message}" for worker, error in own]
    why = next(iter([*gone.values(), *told]), "") or broken or f"{', '.join(stopped)} can't reach a peer"
    newest = current.generation if state.next is None else state.next.generation
    over = replace(
        state,
        aborted=newest,
        aborted_s=seen.now_s,
        why=why,
        next=None,
        next_first_step=None,
        next_why="",
        fence=None,
        broken_s=None,
    )
    if gone or stopped:
        note = Note("generation_aborted", {"generation": current.generation, "step": seen.step, "why": why})
        account = Recovery(current.generation, (), "network", current.world.size, 0, seen.step, why)
        return Decision(replace(over, recovery=account, traceback=""), (note,))
    return _abandoned(over, seen, newest, why)


def hear_errors(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Enter what members of an aborted generation say of themselves, once each. It may come after the complaints of
    their peers: whoever only lost a peer has nothing to write down first."""
    if not state.is_recovering or state.current is None or state.recovery is None:
        return Decision(state)
    generation = state.current.generation
    heard = {loss.worker for loss in state.losses if loss.generation == generation}
    own = _own_errors(seen, (w for w in state.members if w not in heard and _stopped_in(seen, w) == generation))
    if not own:
        return Decision(state)
    moment_s = seen.now_s if state.aborted_s is None else state.aborted_s  # all of it is one failure
    losses = tuple(Loss(w, seen.nodes.get(w, ""), e.kind, seen.step, moment_s, generation) for w, e in own)
    worker, error = own[0]
    is_culprit = state.recovery.cause == "network" and all(w in state.crew for w in state.members)
    why = f"{worker} failed: {error.kind}: {error.message}" if is_culprit else state.why
    account = replace(state.recovery, cause=error.kind, why=why) if is_culprit else state.recovery
    known = (*state.losses, *losses)[-MAX_LOSSES:]
    traceback = error.traceback or state.traceback
    told, notes = respond(
        limits, replace(state, recovery=account, losses=known, why=why, traceback=traceback), seen, losses
    )
    return Decision(told, notes)


def bury_members(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Drop members of an aborted generation from the crew who are gone, or don't stop although they should."""
    if not state.is_recovering or state.aborted_s is None:
        return Decision(state)
    gone = {w: why for w in state.crew if w in state.members and (why := why_gone(seen, w))}
    rest = [w for w in state.crew if w in state.members and w not in gone and not _has_stopped(state, seen, w)]
    if seen.now_s - state.aborted_s >= STOP_S:
        gone |= {w: f"{w} hung: it did not stop within {STOP_S:.0f} s of the generation's end" for w in rest}
    elif seen.now_s - state.aborted_s >= SILENT_WHEN_STOPPING_S:
        silent = [w for w in rest if is_silent(seen, w, SILENT_WHEN_STOPPING_S)]
        gone |= {w: f"{w} did not answer when its peers had lost somebody" for w in silent}
    hung = [w for w in gone if w in rest or is_silent(seen, w)]
    if not gone:
        return Decision(state)
    losses = tuple(
        Loss(w, seen.nodes.get(w, ""), "hang" if w in hung else cause_of_loss(seen, w), seen.step, seen.now_s)
        for w in gone
    )
    notes = tuple(
        Note(
            "worker_lost",
            {"worker": loss.worker, "step": loss.step, "cause": loss.cause, "why": gone[loss.worker], "member": True},
        )
        for loss in losses
    )
    buried = replace(
        state,
        crew=tuple(w for w in state.crew if w not in gone),
        losses=(*state.losses, *losses)[-MAX_LOSSES:],
        why=next(iter(gone.values())),
    )
    buried, told = respond(limits, buried, seen, losses)
    return Decision(buried, (*notes, *told, *(Dismiss(w) for w in hung)))


def recover(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan the generation after a loss, once nobody trains any more and enough workers are there."""
    if not state.is_recovering or state.next is not None or state.current is None:
        return Decision(state)
    survivors = tuple(w for w in state.members if w in state.crew)
    if not all(_has_stopped(state, seen, w) for w in survivors):
        return Decision(state)
    if held_back_s([loss for loss in state.losses if loss.cause not in PLACE], seen.now_s):
        return Decision(state)
    if hopeless := _hopeless(limits, state, seen):
        return ended(state, RunPhase.FAILED, hopeless, state.traceback)
    cut = newest_cut(_worlds(state), _held(state, seen))
    if cut is None:
        return _fall_back(limits, state, seen)
    wanted = wanted_size(limits, state.wish, seen.step + 1)
    standbys = warm_standbys(state, seen)
    members = (survivors + standbys)[: max(wanted, limits.min_workers)]
    if len(members) < limits.min_workers or seen.store_address is None:
        return Decision(state)
    return _planned_from(limits, state, seen, cut, members)


def _abandoned(state: RunState, seen: Observation, generation: int, why: str) -> Decision:
    """Count a failed move; after several in a row the run keeps the size that it has, if it has one already."""
    failed_moves = state.failed_moves + 1
    gives_up = failed_moves >= MAX_FAILED_MOVES and state.current is not None
    wish = Wish(len(state.members), seen.step + 1) if gives_up else state.wish
    note = Note("move_abandoned", {"generation": generation, "why": why, "gave_up": gives_up})
    return Decision(replace(state, failed_moves=failed_moves, wish=wish, why=why), (note,))


def restart_first(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """A world that is made of the seed or of a checkpoint has lost somebody: plan it anew."""
    plan = state.next
    if plan is None or state.current is not None:
        return Decision(state)
    lost = [w for w in plan.world.members if w not in state.crew]
    failed = [w for w in plan.world.members if _failed_generation(seen, w) == plan.generation]
    why = without_store(state, seen)
    if not lost and not failed and not why:
        return Decision(state)
    if not lost and not why and not is_blame_due(state, seen):
        return Decision(replace(state, broken_s=seen.now_s if state.broken_s is None else state.broken_s))
    what = "was lost" if lost else f"could not reach generation {plan.generation}"
    why = why or f"{', '.join(lost or failed)} {what}"
    over = replace(state, aborted=plan.generation, next=None, next_why="", broken_s=None)
    return _abandoned(over, seen, plan.generation, why)


def _hopeless(limits: RunLimits, state: RunState, seen: Observation) -> str:
    """Why another attempt would end like the ones before; empty if it may not."""
    same = [loss for loss in state.losses if loss.cause == USER_ERROR and loss.step == seen.step]
    if len(same) >= MAX_USER_ERRORS:
        return f"the same error {len(same)} times after step {seen.step}: {state.why}"
    fruitless = [recovery for recovery in state.recoveries[-MAX_FRUITLESS:] if recovery.step >= seen.step]
    if len(fruitless) >= MAX_FRUITLESS:
        return f"{len(fruitless)} recoveries in a row without a step; {state.why}"
    spent = overdrawn(state.losses, seen.now_s, limits.recovery.budgets)
    return f"{spent} The newest: {state.why}" if spent else ""


def _planned_from(
    limits: RunLimits, state: RunState, seen: Observation, cut: Cut, members: tuple[str, ...]
) -> Decision:
    plans = {plan.generation: plan for plan in (state.previous, state.current) if plan is not None}
    origin = plans[cut.generation]
    world = World(state.num_generations, members)
    holders = world_of(cut.generation, cut.holders)
    if members == origin.world.members and cut.holders == members:
        placement = origin.placement
    else:
        placement = Placement.rebalanced(placement_of_cut(origin.placement, cut.holders), holders, world)
    source = Source(origin.world, origin.placement, cut.holders, cut.step)
    state = replace(_blamed(state, seen), recovery=_account(state, seen, cut.step, "memory"))
    change, why = SizeChange(world.size, None), f"recovers: {state.why}"
    return with_plan(state, seen, world, placement, source, change, why, limits.protected)


def _blamed(state: RunState, seen: Observation) -> RunState:
    """Nobody was lost and nobody erred: then the network did."""
    account = state.recovery
    if account is None or account.cause != "network" or any(w not in state.crew for w in state.members):
        return state
    loss = Loss("", "", "network", seen.step, seen.now_s)
    return replace(state, losses=(*state.losses, loss)[-MAX_LOSSES:])


def _account(state: RunState, seen: Observation, step: int, source: str) -> Recovery | None:
    """What the recovery is known to cost so far; None if nobody was lost but a move."""
    account = state.recovery
    if account is None:
        return None
    lost = tuple(w for w in state.members if w not in state.crew)
    causes = [loss.cause for loss in state.losses if loss.worker in lost]
    return replace(
        account,
        lost=lost,
        cause=causes[0] if causes else account.cause,
        step=step,
        why=state.why,
        source=source,
        steps_replayed=max(0, max(account.step, seen.step) - step),
        steps_lost=max(0, _committed(state, seen) - step),
    )


def _committed(state: RunState, seen: Observation) -> int:
    """The newest step that survivors know to be committed; without any, the newest that was published."""
    known = [report.committed for w in state.members if (report := seen.reports.get(w)) is not None]
    return max(known, default=seen.progress.watermark)


def _fall_back(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Nobody reachable has a whole state: begin again from a checkpoint, or from the seed if there is none."""
    if not state.wants_restore:
        return Decision(replace(state, wants_restore=True))
    restore = seen.restorable
    done = restore.step if restore else -1
    fields = {
        "step": done,
        "checkpoint": restore.path if restore else None,
        "why": state.why,
    }
    account = _account(state, seen, done, "checkpoint")
    begun = replace(state, previous=state.current, current=None, restore=restore, recovery=account, wants_restore=False)
    return Decision(begun, (Note("rolled_back", fields),))


def _notice_broken_recovery(state: RunState, seen: Observation) -> Decision:
    """Somebody was lost on the way to the generation that recovers: give it up, and free whoever waits in it."""
    if state.next is None:
        return Decision(state)
    lost = [w for w in state.next.involved if w not in state.crew or why_gone(seen, w)]
    failed = [w for w in state.next.involved if _failed_generation(seen, w) == state.next.generation]
    why = without_store(state, seen)
    if not lost and not failed and not why:
        return Decision(state)
    if not lost and not why and not is_blame_due(state, seen):
        return Decision(replace(state, broken_s=seen.now_s if state.broken_s is None else state.broken_s))
    why = why or (f"{', '.join(lost)} was lost" if lost else f"{', '.join(failed)} could not reach it")
    again = replace(state, aborted=state.next.generation, aborted_s=seen.now_s, next=None, next_why="", broken_s=None)
    return _abandoned(again, seen, state.next.generation, why)


def _broken_behind_fence(state: RunState, seen: Observation) -> str:
    """Why the move that the current world has begun can't be finished; empty if it can, or none has begun."""
    if state.next is None or state.current is None:
        return ""
    begun = state.fence is not None or any(seen.phase(w) is not Phase.TRAINING for w in state.members)
    if not begun:
        return ""
    lost = [w for w in state.next.involved if w not in state.crew or why_gone(seen, w)]
    if lost:
        return f"{', '.join(lost)} was lost"
    failed = [w for w in state.next.involved if _failed_generation(seen, w) == state.next.generation]
    return f"{', '.join(failed)} could not reach generation {state.next.generation}" if failed else ""


def _worlds(state: RunState) -> Iterable[World]:
    """Generations whose states may still be whole: the current one, and until it has settled the one before."""
    assert state.current is not None
    yield state.current.world
    if state.previous is not None and state.settled < state.current.generation:
        yield state.previous.world


def _held(state: RunState, seen: Observation) -> dict[str, tuple[Holding, ...]]:
    idle = (Phase.STRANDED, Phase.READY, Phase.STANDBY)
    return {w: seen.reports[w].holdings for w in state.crew if seen.phase(w) in idle}


def _has_stopped(state: RunState, seen: Observation, member: str) -> bool:
    """It has left the current generation, and says what it holds."""
    assert state.current is not None
    report = seen.reports.get(member)
    if report is None:
        return False
    waits = report.phase is Phase.READY and report.generation > state.current.generation
    return report.phase is Phase.STRANDED or waits


def _stopped_in(seen: Observation, worker: str) -> int:
    report = seen.reports.get(worker)
    return report.stopped if report is not None else -1


def _own_errors(seen: Observation, workers: Iterable[str]) -> list[tuple[str, WorkerError]]:
    """Errors of these workers that are more than a lost peer."""
    errors = [(worker, report.error) for worker in workers if (report := seen.reports.get(worker)) is not None]
    return [(worker, error) for worker, error in errors if error is not None and error.kind != "peer_lost"]


def _failed_generation(seen: Observation, worker: str) -> int:
    report = seen.reports.get(worker)
    return report.failed_generation if report is not None else -1
