"""Effects of grants on a run: it is queued, is admitted, holds fewer workers than are wanted, or is preempted and
queued again. Rules of `lifecycle`; `fair_share` decides the grants.

A preempted run writes a checkpoint first and resumes from it: preemption costs no step.
"""

from dataclasses import replace

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_parts import KeeperState, QueueState, ReplayState
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeRequest, wanted_size
from orchestrator.protocol.events.run import Admitted, Granted, Preempted, PriorityChanged, Queued, Resumed, Suspended
from orchestrator.protocol.events.workers import WorkersReleased
from orchestrator.protocol.messages import FinishMode, Restore, ResumeRequest
from orchestrator.protocol.scaling import JUST_COME

# -- Resuming from a checkpoint, after the run has ended, lost its cluster, or was preempted ---------------------------


def resumed(limits: RunLimits, state: RunState, order: ResumeRequest) -> Decision:
    """The state of a resumed run. No worker of the old group is kept; numbers in names continue to grow. Decided stages
    stay decided, at the same steps."""
    done = order.restore.step if order.restore else -1
    size_request = state.size_request if order.workers is None else SizeRequest(order.workers, done + 1, by_hand=True)
    workers = wanted_size(limits, size_request, done + 1)
    event = Resumed(
        token=order.token,
        step=done,
        checkpoint=order.restore.path if order.restore else None,
        workers=workers,
        residuals="left behind" if order.restore and order.restore.reset_residuals else None,
        code=order.code,
    )
    target = replace(
        state.target,
        seq=state.target.seq + 1,
        workers=workers,
        finish=FinishMode.NO,
        reason="resumed",
        stage_requests=state.curriculum.requests,
        checkpoint=-1,
        rebalances=state.balance.requests,
        experts=replace(state.target.experts, number=state.experts.requests),
    )
    begun = replace(begun_again(state, order.restore), target=target, size_request=size_request)
    return Decision(begun, (event,))


def begun_again(state: RunState, restore: Restore | None) -> RunState:
    """The state with an empty worker group and no generation, to begin from this checkpoint; None: from the seed."""
    done = restore.step if restore else -1
    return RunState(
        target=state.target,
        seq=state.seq + 1,
        size_request=state.size_request,
        queue=QueueState(state.queue.grant, state.queue.granted_since, state.queue.since_s),
        priority=state.priority,
        num_spawned=state.num_spawned,
        num_generations=state.num_generations,
        activated=state.activated,
        checkpoint_done=done,
        checkpoint_generation=state.num_generations - 1,
        checkpoint_interval=replace(state.checkpoint_interval, since_s=None),
        rescales=tuple(r for r in state.rescales if r.step < done),
        restore=restore,
        replay=ReplayState(differences=state.replay.up_to(done).differences),
        curriculum=replace(state.curriculum, version=state.curriculum.version + bool(state.curriculum.stages)),
        keeping=KeeperState(count=state.keeping.count),
        balance=replace(state.balance, unmeasured=None),
        experts=state.experts,
    )


# -- Grants of the Scheduler: a run is queued, is admitted, holds fewer workers than are wanted ------------------------


def queued(state: RunState, since_s: float) -> RunState:
    """The state of a run submitted or resumed at `since_s`: queued until the Scheduler admits it."""
    return replace(state, queue=QueueState(JUST_COME, state.queue.granted_since, since_s))


def heed_grant(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Apply the newest grant. A run without a world that loses its grant releases its workers at once."""
    grant, was_out, is_out = seen.grant, state.queue.grant.workers == 0, seen.grant.workers == 0
    if grant == state.queue.grant:
        return Decision(state)
    granted = replace(state, queue=replace(state.queue, grant=grant, granted_since=seen.step + 1))
    wanted = wanted_size(limits, state.size_request, seen.step + 1)
    if was_out and is_out:  # still queued, for another reason
        return Decision(granted, (Queued(grant.why),))
    if was_out:
        waited_s = 0.0 if state.queue.since_s is None else seen.now_s - state.queue.since_s
        let_in = replace(granted, queue=replace(granted.queue, admitted_s=seen.now_s, begun_s=None))
        return Decision(let_in, (Admitted(grant.workers, wanted, grant.why, waited_s),))
    if not is_out:
        return Decision(granted, (Granted(grant.workers, wanted, grant.why),))
    waits = replace(
        granted,
        queue=replace(granted.queue, since_s=seen.now_s if state.queue.since_s is None else state.queue.since_s),
    )
    if state.current is not None:
        return Decision(waits, (Preempted(grant.workers, wanted, grant.why, seen.step),))
    waits = replace(waits, worker_group=(), transition=None)
    gone = WorkersReleased(state.worker_group)
    return Decision(waits, (Queued(grant.why), gone))


def heed_priority(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Record the requested priority of the run. The Scheduler reads it and changes grants accordingly."""
    if seen.priority == state.priority:
        return Decision(state)
    before, now = limits.priority_of(state.priority), limits.priority_of(seen.priority)
    return Decision(replace(state, priority=seen.priority), (PriorityChanged(now, before),))


def suspended(state: RunState, seen: Observation) -> Decision:
    """Release the members of a preempted run whose checkpoint is written, and queue the run again. The record of
    failures and the micro-batch size are kept."""
    if not state.wants_restore:
        return Decision(replace(state, wants_restore=True))
    if seen.unreadable or seen.is_searching:
        return Decision(state)
    assert state.current is not None
    step = seen.restorable.step if seen.restorable else -1
    path = seen.restorable.path if seen.restorable else None
    waits = replace(
        begun_again(state, seen.restorable),
        recoveries=state.recoveries,
        failures=replace(state.failures.without_failed_spawns(), transitions=0),
        micro_batch=replace(state.micro_batch, size=state.micro_batch.size or state.current.micro_batch, probes=()),
    )
    return Decision(waits, (Suspended(step, path),))
