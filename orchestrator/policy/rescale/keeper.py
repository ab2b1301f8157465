"""Choice of the standby that keeps the snapshots of a world of one: its *keeper*. A rule of `lifecycle`.

A keeper is chosen as soon as a generation of one worker begins or a standby becomes warm. One that is to leave, or that
is needed no longer, stays a keeper until another one has a snapshot.
"""

from dataclasses import replace

from orchestrator.policy.health.leaving import leavers
from orchestrator.policy.rescale.worker_pool import group_size, why_gone
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.workers import KeeperConnected, KeeperLost
from orchestrator.protocol.messages import Keeper
from orchestrator.protocol.worker_phase import Phase

AGAIN_S = 10.0  # after a connection to a keeper has ended, until another one is chosen


def choose_keeper(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Choose a keeper where there should be another one, and drop those that are no longer needed."""
    if state.is_recovering or not all(_is_active(state, seen, member) for member in state.members):
        return Decision(state)  # what they hold may be the only state
    keeping = state.keeping
    named = _of_this_generation(state)
    chosen = tuple(keeper for keeper in named if _is_needed(state, seen, keeper, is_newest=keeper is named[-1]))
    count, ended_s = keeping.count, None
    if chosen and _has_ended(state, seen, chosen[-1]):
        ended_s = seen.now_s if keeping.ended_s is None else keeping.ended_s
    is_held_back = ended_s is not None and seen.now_s - ended_s < AGAIN_S
    worker = _candidate(limits, state, seen, chosen) if _wants_another(limits, state, seen, chosen) else None
    if worker is not None and not is_held_back:
        chosen, count, ended_s = (*chosen, _keeper(state, seen, worker)), count + 1, None
    connected = next((keeper for keeper in chosen if holds_snapshot(state, seen, keeper)), None)
    changed = replace(keeping, chosen=chosen, count=count, connected=connected, ended_s=ended_s)
    return Decision(state if changed == keeping else replace(state, keeping=changed), _news(state, seen, connected))


def holds_snapshot(state: RunState, seen: Observation, keeper: Keeper) -> bool:
    """Whether the keeper has a snapshot of the member, and is sent the following ones."""
    member = seen.report(state.members[0]).protection
    return member.kept_by == keeper.number and not _has_ended(state, seen, keeper)


def is_connecting(state: RunState, seen: Observation) -> bool:
    """Whether a keeper of the current generation is chosen, and none has a snapshot yet: older state may be needed."""
    live = [keeper for keeper in _of_this_generation(state) if not _has_ended(state, seen, keeper)]
    return bool(live) and not any(holds_snapshot(state, seen, keeper) for keeper in live)


def _is_active(state: RunState, seen: Observation, member: str) -> bool:
    """Whether the member trains in the current generation, or is about to begin."""
    report, generation = seen.report(member), state.current.generation if state.current is not None else None
    return report.phase is Phase.TRAINING or (report.phase is Phase.READY and report.generation == generation)


def _of_this_generation(state: RunState) -> tuple[Keeper, ...]:
    generation = state.current.generation if state.current is not None else None
    return tuple(keeper for keeper in state.keeping.chosen if keeper.generation == generation)


def _news(state: RunState, seen: Observation, connected: Keeper | None) -> tuple[Event, ...]:
    """Events of a changed connection within a generation."""
    before = state.keeping.connected
    if connected == before:
        return ()
    if connected is not None:
        return (KeeperConnected(connected.worker, seen.step),)
    assert before is not None
    over = state.current is None or before.generation != state.current.generation
    return () if over else (KeeperLost(before.worker, seen.step),)


def _is_needed(state: RunState, seen: Observation, keeper: Keeper, is_newest: bool) -> bool:
    """Whether it gets snapshots or will, or has the newest one that any keeper has. The newest keeper is named until
    there is another one."""
    if keeper.worker not in state.worker_group or why_gone(seen, keeper.worker):
        return False
    kept_by = seen.report(state.members[0]).protection.kept_by
    is_to_come = keeper.number > kept_by and not _has_ended(state, seen, keeper)
    return is_newest or keeper.number == kept_by or is_to_come


def _wants_another(limits: RunLimits, state: RunState, seen: Observation, chosen: tuple[Keeper, ...]) -> bool:
    if not limits.protected or len(state.members) != 1 or state.next is not None or state.is_ending:
        return False
    if seen.store_address is None:
        return False
    return not chosen or _has_ended(state, seen, chosen[-1]) or chosen[-1].worker in leavers(state, seen)


def _candidate(limits: RunLimits, state: RunState, seen: Observation, chosen: tuple[Keeper, ...]) -> str | None:
    """A warm worker outside the world that will stay: on another node if possible, and without a replay check. A member
    of the world before counts as soon as it has handed over its state."""
    (member,) = state.members
    leaving = leavers(state, seen)
    out = {member, *leaving, *(keeper.worker for keeper in chosen if not _has_ended(state, seen, keeper))}
    idle = [w for w in state.worker_group if w not in out and seen.phase(w) in (Phase.STANDBY, Phase.READY)]
    surplus = len(state.worker_group) - len(leaving) - group_size(limits, state, seen)
    staying = [worker for worker in idle if not why_gone(seen, worker)][: max(0, len(idle) - max(0, surplus))]
    node, check = seen.nodes.get(member, ""), state.replay.task
    replays = check.worker if check is not None else None
    return min(staying, key=lambda worker: (seen.nodes.get(worker, "") == node, worker == replays), default=None)


def _keeper(state: RunState, seen: Observation, worker: str) -> Keeper:
    assert state.current is not None and seen.store_address is not None
    number = state.keeping.count
    return Keeper(
        number=number,
        worker=worker,
        generation=state.current.generation,
        store_address=seen.store_address,
        store_prefix=f"{seen.term}/keeper/{number}",
        after_step=seen.progress.watermark,
    )


def _has_ended(state: RunState, seen: Observation, keeper: Keeper) -> bool:
    member, here = (seen.report(worker).protection for worker in (state.members[0], keeper.worker))
    is_skipped = member.unkept > keeper.number and member.kept_by != keeper.number  # else a later one has failed
    return here.unkept >= keeper.number or member.unkept == keeper.number or is_skipped
