"""Membership of the worker group: apply requests, remove failed workers, spawn and release. Rules of `lifecycle`."""

from dataclasses import replace

from orchestrator.policy.health.budget import (
    BURST_S,
    PLACE,
    cause_of_loss,
    failures_by_node,
    quarantined,
    spawns_held_back_s,
)
from orchestrator.policy.health.hangs import is_silent
from orchestrator.policy.health.leaving import is_to_leave, leavers
from orchestrator.policy.health.stragglers import is_to_be_replaced
from orchestrator.policy.rescale.generation_plan import warm_standbys
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import STALL_STEPS, adds_too_little
from orchestrator.policy.state.run_parts import WorkerFailure
from orchestrator.policy.state.run_state import Action, Decision, KillWorker, Observation, RunState
from orchestrator.policy.state.world_size import SizeRequest, wanted_size, workers_to_hold
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.run import TargetChanged
from orchestrator.protocol.events.workers import (
    NodeQuarantined,
    NodeReleased,
    WorkerLost,
    WorkersReleased,
    WorkersSpawned,
)
from orchestrator.protocol.messages import DesiredRunState, FinishMode, GenerationPlan
from orchestrator.protocol.worker_phase import Phase


def apply_target(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Apply the newest target. Its size takes effect when the present transition has ended."""
    target = seen.target
    if target.seq <= state.target.seq:
        return Decision(state)
    event = TargetChanged(target.workers, target.finish.value, target.reason)
    if target.finish is not FinishMode.NO or _keeps_the_size(state, target):
        return Decision(replace(state, target=target), (event,))
    wanted, before = (
        wanted_size(limits, state.size_request, seen.step + 1),
        state.size_request or SizeRequest(limits.initial_workers, 0),
    )
    grown_s = seen.now_s if target.workers > wanted and not target.by_hand else before.grown_s
    cap, cap_stage = before.cap, before.cap_stage
    if target.workers < wanted and not target.by_hand and adds_too_little(limits, seen.progress, wanted):
        cap, cap_stage = target.workers, seen.progress.stage
    size_request = SizeRequest(target.workers, seen.step + 1, target.by_hand, grown_s, cap, cap_stage)
    event = replace(event, by_hand=target.by_hand)
    failures = replace(state.failures, transitions=0)
    if target.by_hand:  # tried without delay
        failures = failures.without_failed_spawns()
    return Decision(replace(state, target=target, size_request=size_request, failures=failures), (event,))


def _keeps_the_size(state: RunState, target: DesiredRunState) -> bool:
    """Whether it asks for a stage, a checkpoint, other experts or another placement only: the size in it then repeats
    the last request, which may be long ago."""
    same = (target.workers, target.by_hand) == (state.target.workers, state.target.by_hand)
    asked, before = ((t.stage_requests, t.checkpoint, t.rebalances, t.experts.number) for t in (target, state.target))
    return asked != before and same


def remove_lost_workers(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Drop failed workers from the worker group, except for the world's members, which `recovery` handles."""
    members = set(state.members)
    gone = {w: why for w in state.worker_group if w not in members and (why := why_gone(seen, w))}
    if not gone:
        return Decision(state)
    current, previous = _members_of(state.current, state.next), _members_of(state.previous)
    newcomers = [w for w in gone if w not in current | previous and not is_to_leave(state, seen, w)]
    places = {w: seen.nodes.get(w, "") or w for w in newcomers}  # workers that fail with their node count once
    training = current | previous if state.settled < state.activated else current
    notes: tuple[Action, ...] = tuple(WorkerLost(worker, why, member=False) for worker, why in gone.items())
    worker_group = tuple(w for w in state.worker_group if w not in gone)
    worker, why = next(iter(gone.items()))
    failures = tuple(
        WorkerFailure(w, seen.nodes.get(w, ""), cause, seen.step, seen.now_s, is_member=w in training)
        for w in gone
        if (cause := "hang" if is_silent(seen, w) else cause_of_loss(state, seen, w)) in PLACE
    )
    recorded = state.failures.with_new(failures).with_failed_spawns(places, state.num_spawned, seen.now_s)
    remaining = replace(
        state,
        worker_group=worker_group,
        failures=recorded,
        why=why,
        traceback=traceback_of(seen, worker),
    )
    return Decision(remaining, (*notes, *(KillWorker(w) for w in gone if is_silent(seen, w))))


def hold_worker_group(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Spawn the workers that will be needed, and release standbys that won't, or that are to leave. An ending run gets
    no more unless it is recovering; a preempted one gets none in any case."""
    if state.gives_way or (state.is_ending and not state.is_recovering):
        return Decision(state)
    leaving = leavers(state, seen)
    wanted = limits.min_workers if state.is_ending else group_size(limits, state, seen)
    missing = wanted - (len(state.worker_group) - len(leaving))
    is_urgent = any(worker in state.members for worker in leaving)
    held_back_s = spawns_held_back_s(state.failures, seen.now_s, is_urgent)
    if missing > 0 and not _in_transition(limits, state, seen) and held_back_s <= 0:
        first = state.num_spawned
        spawned = tuple(f"w{number}" for number in range(first, first + missing))
        note = WorkersSpawned(spawned)
        grown = replace(state, worker_group=state.worker_group + spawned, num_spawned=first + missing)
        return Decision(grown, (note,))
    if (missing < 0 or leaving) and state.next is None and not state.is_recovering:
        released = _release(state, seen, max(0, -missing), leaving, keeps=wanted > len(state.members))
        if released.actions:
            return released
    return Decision(state if missing > 0 else _forget_failed_spawns(state, seen))


def lacks_members(limits: RunLimits, state: RunState, seen: Observation) -> bool:
    """Whether the run can't go on without workers that aren't warm yet."""
    if state.current is None:
        return True
    there = len([w for w in state.members if w in state.worker_group]) + len(warm_standbys(state, seen))
    return state.is_recovering and there < limits.min_workers


def group_size(limits: RunLimits, state: RunState, seen: Observation) -> int:
    """Number of workers that a run which isn't ending should have, members and others, without leavers."""
    wanted = workers_to_hold(limits, state.size_request, seen.step + 1, state.queue.grant)
    return state.queue.grant.of(wanted + is_to_be_replaced(limits, state))


def quarantine_nodes(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Keep new workers off nodes where workers fail; release the nodes once the failures are old enough."""
    after = limits.recovery.quarantine_after
    living = set(state.worker_group).difference(seen.lost)
    nodes = {node for worker, node in seen.nodes.items() if worker in living}
    now = (
        quarantined(state.failures.recent, seen.now_s, after, nodes, state.failures.quarantine)
        if state.failures.recent
        else ()
    )
    if now == state.failures.quarantine:
        return Decision(state)
    counts = failures_by_node(state.failures.recent, seen.now_s)
    fresh = [node for node in now if node not in state.failures.quarantine]
    notes: list[Event] = [NodeQuarantined(node, counts[node]) for node in fresh]
    notes += [NodeReleased(node) for node in state.failures.quarantine if node not in now]
    return Decision(replace(state, failures=replace(state.failures, quarantine=now)), tuple(notes))


def _in_transition(limits: RunLimits, state: RunState, seen: Observation) -> bool:
    """Whether a transition is under way, or the new world has done `STALL_STEPS` steps at most. A starting worker would
    take processors from the world's members, for a standby that isn't needed before the transition is over."""
    if state.current is None:
        return False
    if state.is_recovering:  # no new workers, unless too few are left
        return not lacks_members(limits, state, seen)
    is_planned = state.next is not None
    changes = [r.step for r in state.rescales[-1:]] + [r.step for r in state.recoveries[-1:]]
    newest = max(changes, default=None)
    is_new = newest is not None and seen.step <= newest + STALL_STEPS
    return is_planned or is_new


def why_gone(seen: Observation, worker: str) -> str:
    """Why this worker is unusable: its process ended, it failed, or it is silent; empty if it is usable."""
    if worker in seen.lost:
        return f"{worker} died: {seen.lost[worker]}"
    report = seen.report(worker)
    if report.phase is Phase.FAILED:
        error = report.health.error
        return f"{worker} failed: {error.kind}: {error.message}" if error else f"{worker} failed without a reason"
    if is_silent(seen, worker):
        return f"{worker} has not answered for {seen.silence_s[worker]:.0f} s"
    return ""


def traceback_of(seen: Observation, worker: str) -> str:
    """Traceback of the error with which this worker failed; empty if there is none, or it is only a lost peer."""
    error = seen.report(worker).health.error
    return error.traceback if error is not None and error.kind != "peer_lost" else ""


def _release(state: RunState, seen: Observation, num_surplus: int, leaving: tuple[str, ...], keeps: bool) -> Decision:
    """Release workers that are to leave, then a slow standby or the youngest; none that holds a shard of a checkpoint
    that isn't complete. `keeps`: a keeper that is to leave stays until another one has a snapshot, as there will be
    one; of the others the keeper is released last."""
    begins_anew = state.current is None  # from a checkpoint: state in workers is not used
    if state.settled < state.activated and not begins_anew:
        return Decision(state)  # a worker that left may hold state that is needed if the new world fails
    if any(member not in seen.reports for member in state.members):
        return Decision(state)  # this controller has just restarted and has no reports yet
    idle = (Phase.COLD, Phase.WARMING, Phase.STANDBY)
    stopped = (Phase.STRANDED, Phase.READY)
    keepers = {keeper.worker for keeper in state.keeping.chosen}
    free = [
        worker
        for worker in state.worker_group
        if worker not in state.involved
        and not (keeps and worker in leaving and worker in keepers)
        and (seen.phase(worker) in idle or (worker in leaving and seen.phase(worker) in stopped))
        and not _owes_shard(state, seen, worker)
    ]
    staying = sorted((w for w in free if w not in leaving), key=lambda w: (w not in keepers, w == state.straggler))
    released = [w for w in free if w in leaving] + staying[len(staying) - num_surplus :]
    if not released:
        return Decision(state)
    worker_group = tuple(w for w in state.worker_group if w not in released)
    return Decision(replace(state, worker_group=worker_group), (WorkersReleased(tuple(released)),))


def _owes_shard(state: RunState, seen: Observation, worker: str) -> bool:
    """Whether a checkpoint that isn't complete yet needs this worker, which has written its part or still tries to."""
    report = seen.report(worker)
    generations = {plan.generation for plan in (state.previous, state.current) if plan is not None}
    pending = (s for s in report.shards if (s.generation, s.step) > state.checkpoint and s.generation in generations)
    return report.unsaved is not None or any(pending)


def _forget_failed_spawns(state: RunState, seen: Observation) -> RunState:
    """Reset the count of failed spawns once the whole worker group is warm and none has failed for `BURST_S`."""
    cold = (Phase.COLD, Phase.WARMING)
    is_calm = seen.now_s - state.failures.spawn_s >= BURST_S
    if state.failures.spawns and is_calm and all(seen.phase(worker) not in cold for worker in state.worker_group):
        return replace(state, failures=state.failures.without_failed_spawns())
    return state


def _members_of(*plans: GenerationPlan | None) -> set[str]:
    return {member for plan in plans if plan is not None for member in plan.world.members}
