"""Recovery after members of the world fail. Rules of `lifecycle`; `orchestrator.policy.recovery.detect` detects it.

    recover  all survivors have stopped -> newest complete state -> plan g+1 from it -> (transition) READY -> activate

Sources in order: a rank's own memory, its buddy's or keeper's snapshot, the newest checkpoint, the one before. Ranks
verify what they read of a checkpoint; if one finds damage the run begins from another one, or without that worker.
Survivors continue at once if they are enough; replacements of the failed workers join at a later fence.
"""

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import (
    Holding,
    RecoveryPoint,
    find_recovery_point,
    placement_at_recovery_point,
    world_of,
)
from orchestrator.elastic.world import World
from orchestrator.policy.health.budget import PLACE, exceeded_budget, held_back_s
from orchestrator.policy.health.leaving import leavers
from orchestrator.policy.recovery.detect import STOP_S, has_stopped
from orchestrator.policy.recovery.holders import newest_held
from orchestrator.policy.rescale.expert_number import with_experts
from orchestrator.policy.rescale.generation_plan import (
    node_by_node,
    nodes_of,
    warm_standbys,
    with_change_at,
    with_plan,
)
from orchestrator.policy.state.checkpoint_parts import complete_checkpoints
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import WorkerFailure
from orchestrator.policy.state.run_state import USER_ERROR, Decision, KillWorker, Observation, RunState, ended
from orchestrator.policy.state.world_size import SizeChange, wanted_size
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.workers import WorkerLost, WorkersReleased
from orchestrator.protocol.messages import FinishMode, Restore, StateSource
from orchestrator.protocol.status import Recovery, RunPhase
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import CHECKPOINT_CORRUPT
from orchestrator.spec.fault_tolerance import COMMITTED

MAX_USER_ERRORS = 2  # in the same step: then it is deterministic
MAX_FRUITLESS = 5  # recoveries in a row with no step between them
IDLE = (Phase.STRANDED, Phase.READY, Phase.STANDBY)  # phases in which a worker reports what it holds


def recover(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan the generation after a failure, once all survivors have stopped and enough workers are available."""
    if not state.is_recovering or state.next is not None or state.current is None:
        return Decision(state)
    survivors = tuple(w for w in state.members if w in state.worker_group)
    if not all(has_stopped(state, seen, w) for w in survivors):
        return Decision(state)
    if not survivors and _keeper_is_late(state, seen):
        return Decision(state)
    if held_back_s([failure for failure in state.failures.recent if failure.cause not in PLACE], seen.now_s):
        return Decision(state)
    if hopeless := _hopeless(limits, state, seen):
        return ended(state, RunPhase.FAILED, hopeless, state.traceback)
    point = find_recovery_point(_worlds(state), _held(state, seen))
    if point is None or (limits.publish == COMMITTED and point.step < state.checkpoint_done):  # it was published
        return _fall_back(limits, state, seen)
    wanted = wanted_size(limits, state.size_request, seen.step + 1, state.queue.grant)
    leaving = leavers(state, seen)  # members again only where others are too few; their state is used anyway
    stay, leave = (tuple(w for w in survivors if (w in leaving) is going) for going in (False, True))
    keepers = _keepers(state, seen)
    standbys = tuple(dict.fromkeys((*(w for w in keepers if w not in leaving), *warm_standbys(state, seen))))
    leave += tuple(w for w in keepers if w in leaving)
    least = limits.min_workers
    if state.gives_way:  # survivors are enough for a checkpoint, and no other worker has a place
        wanted, least = len(survivors), 1
    chosen = (stay + standbys)[: max(wanted, least)]
    members = chosen[: len(stay)] + node_by_node(seen, chosen[len(stay) :])
    members += leave[: max(0, least - len(members))]
    if len(members) < least or seen.store_address is None:
        return Decision(state)
    return _planned_from(limits, state, seen, point, members)


def _hopeless(limits: RunLimits, state: RunState, seen: Observation) -> str:
    """Why another attempt would fail like the ones before; empty if it might succeed."""
    same = [failure for failure in state.failures.recent if failure.cause == USER_ERROR and failure.step == seen.step]
    if len(same) >= MAX_USER_ERRORS:
        return f"the same error {len(same)} times after step {seen.step}: {state.why}"
    fruitless = [recovery for recovery in state.recoveries[-MAX_FRUITLESS:] if recovery.step >= seen.step]
    if len(fruitless) >= MAX_FRUITLESS:
        return f"{len(fruitless)} recoveries in a row without a step; {state.why}"
    spent = exceeded_budget(state.failures.recent, seen.now_s, limits.recovery.budgets)
    return f"{spent} The newest: {state.why}" if spent else ""


def _planned_from(
    limits: RunLimits, state: RunState, seen: Observation, point: RecoveryPoint, members: tuple[str, ...]
) -> Decision:
    plans = {plan.generation: plan for plan in (state.previous, state.current) if plan is not None}
    origin = plans[point.generation]
    world = World(state.num_generations, members)
    holders = world_of(point.generation, point.holders)
    made = state.experts.made_by(origin.generation)
    state, experts = with_change_at(limits, state, seen, point.step + 1, origin.experts, made)
    held = placement_at_recovery_point(origin.placement, point.holders)
    if experts is not None:
        placement = with_experts(held, experts, limits.moe_layers, holders, world, nodes_of(seen, members))
    elif members == origin.world.members and point.holders == members:
        placement = origin.placement
    else:
        placement = ExpertPlacement.rebalanced(held, holders, world, nodes_of(seen, members))
    is_changed = made > point.step  # by a change whose first step was not done
    source = StateSource(origin.world, origin.placement, point.holders, point.step, is_changed)
    abort = replace(state.abort, account=_account(limits, state, seen, point.step, "memory"))
    state = replace(_blamed(state, seen), abort=abort, wants_restore=False)
    change, why = SizeChange(world.size, None), f"recovers: {state.why}"
    return with_plan(limits, state, seen, world, placement, source, change, why, experts=experts)


def _blamed(state: RunState, seen: Observation) -> RunState:
    """The state with a network failure recorded, where no worker was lost and none reported another error."""
    account = state.abort.account
    if account is None or account.cause != "network" or any(w not in state.worker_group for w in state.members):
        return state
    failure = WorkerFailure("", "", "network", seen.step, seen.now_s)
    return replace(state, failures=state.failures.with_new([failure]))


def _account(limits: RunLimits, state: RunState, seen: Observation, step: int, source: str) -> Recovery | None:
    """The recovery's cost, as far as known; None if a transition failed but no worker."""
    account = state.abort.account
    if account is None:
        return None
    lost = tuple(w for w in state.members if w not in state.worker_group)
    causes = [failure.cause for failure in state.failures.recent if failure.worker in lost]
    return replace(
        account,
        lost=lost,
        cause=causes[0] if causes else account.cause,
        step=step,
        why=state.why,
        source=source,
        steps_replayed=max(0, max(account.step, seen.step) - step),
        steps_lost=max(0, _committed(limits, state, seen) - step),
    )


def _committed(limits: RunLimits, state: RunState, seen: Observation) -> int:
    """The newest step that members' reports show as committed; without any, the newest that was published."""
    if limits.publish == COMMITTED:
        return max(seen.progress.watermark, newest_held(state, seen))
    known = [report.protection.committed for w in state.members if (report := seen.reports.get(w)) is not None]
    return max(known, default=seen.progress.watermark)


def _fall_back(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Begin again from a checkpoint, or from the seed if there is none: no live workers hold a whole state. One that
    lacks only its entry in the journal comes first, as its steps may be published."""
    recorded = max(seen.progress.watermark, seen.recording)
    if any(commit.step <= recorded for commit in complete_checkpoints(state, seen)):
        return Decision(state)
    if not state.wants_restore:
        return Decision(replace(state, wants_restore=True))
    if seen.unreadable or seen.is_searching:  # a good one may exist
        return Decision(state)
    restore = seen.restorable
    done = restore.step if restore else -1
    account = _account(limits, state, seen, done, "checkpoint")
    note = RolledBack(done, restore.path if restore else None, state.why)
    begun = _begun_from(restore, replace(state, previous=state.current, current=None), account)
    if not state.gives_way:
        return Decision(begun, (note,))
    gone = WorkersReleased(state.worker_group)
    return Decision(replace(begun, finish=FinishMode.NO, worker_group=()), (note, gone))


def restore_another(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Begin from another checkpoint than the one in which a rank has found damage, once one without is known; from the
    same one if it is good, without the workers that said otherwise."""
    if state.current is not None or not state.wants_restore or seen.unreadable or seen.is_searching:
        return Decision(state)
    restore, account = seen.restorable, state.abort.account
    if restore is not None and state.restore is not None:
        restore = replace(restore, reset_residuals=state.restore.reset_residuals)
        if restore == state.restore:
            return _without_misreaders(state, seen)
    done = restore.step if restore else -1
    if account is not None:
        further = account.step - done
        account = replace(
            account,
            step=done,
            steps_replayed=account.steps_replayed + further,
            steps_lost=account.steps_lost + further,
        )
    note = RolledBack(done, restore.path if restore else None, state.why)
    return Decision(_begun_from(restore, state, account), (note,))


def _without_misreaders(state: RunState, seen: Observation) -> Decision:
    """Begin from the same checkpoint, of which the controller has read all bytes and found them good, without the
    workers that have found damage in it: their nodes' memory may be at fault."""
    failed = (w for w in state.worker_group if seen.report(w).transition.failed_generation == state.abort.generation)
    errors = ((worker, seen.report(worker).health.error) for worker in failed)
    misread = [worker for worker, error in errors if error is not None and error.kind == CHECKPOINT_CORRUPT]
    failures = [
        WorkerFailure(w, seen.nodes.get(w, ""), "corrupted", seen.step, seen.now_s, is_member=False) for w in misread
    ]
    remaining = replace(
        state,
        worker_group=tuple(worker for worker in state.worker_group if worker not in misread),
        failures=state.failures.with_new(failures),
    )
    why = "{} found damage in a checkpoint that is good: the memory of its node may be at fault"
    lost = (WorkerLost(worker, why.format(worker), member=False) for worker in misread)
    return Decision(_begun_from(state.restore, remaining, state.abort.account), (*lost, *map(KillWorker, misread)))


def _begun_from(restore: Restore | None, state: RunState, account: Recovery | None) -> RunState:
    done = restore.step if restore else -1
    return replace(
        state,
        restore=restore,
        checkpoint_done=done,
        checkpoint_generation=state.num_generations - 1,
        abort=replace(state.abort, account=account),
        wants_restore=False,
        replay=state.replay.up_to(done),
    )


def _worlds(state: RunState) -> Iterable[World]:
    """Worlds whose states may still be complete: the current one, and until it has settled the one before."""
    assert state.current is not None
    yield state.current.world
    if state.previous is not None and state.settled < state.current.generation:
        yield state.previous.world


def _held(state: RunState, seen: Observation) -> dict[str, tuple[Holding, ...]]:
    return {w: seen.reports[w].protection.holdings for w in state.worker_group if seen.phase(w) in IDLE}


def _keepers(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Keepers that could join a generation now, the newest first. They have the state already."""
    keepers = dict.fromkeys(keeper.worker for keeper in reversed(state.keeping.chosen))
    there = (worker for worker in keepers if worker in state.worker_group and worker not in state.members)
    return tuple(worker for worker in there if seen.phase(worker) in IDLE)


def _keeper_is_late(state: RunState, seen: Observation) -> bool:
    """Whether a keeper has yet to report its holdings, and that it gets no more snapshots. One without any report is
    waited for until it is lost, others for a while."""
    there = [keeper for keeper in state.keeping.chosen if keeper.worker in state.worker_group]
    reports = [(keeper, seen.reports.get(keeper.worker)) for keeper in there]
    if any(report is None for _, report in reports):
        return True
    if state.abort.since_s is None or seen.now_s - state.abort.since_s >= STOP_S:
        return False
    return any(r is not None and (r.protection.unkept < k.number or r.phase not in IDLE) for k, r in reports)
