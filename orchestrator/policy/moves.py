"""From one generation to the next: prepare, fence, move, activate, and mend a move that lost somebody.

Each function is a rule of `lifecycle`: a state and what is seen in, a decision out; a rule that has nothing to do
returns the state as it is. While a move is made every member of the old world keeps its old shard, so until the
activation is journalled the old world can always be rebuilt.
"""

import math
from dataclasses import asdict, replace

from orchestrator.elastic.placement import Placement
from orchestrator.elastic.world import World
from orchestrator.policy.limits import RunLimits
from orchestrator.policy.progress import stall_s, typical_step_s
from orchestrator.policy.run_state import Decision, Note, Observation, RunState
from orchestrator.policy.schedule import SizeChange, Wish, next_change, wanted_size, wish_holds
from orchestrator.protocol.messages import Fence, GenerationPlan, Handover, Phase
from orchestrator.protocol.status import Rescale

HORIZON_S = 3.0  # a scheduled change is prepared this long before its step, and no less than HORIZON_STEPS
HORIZON_STEPS = 8
BLAME_S = 1.0  # the death of a process is known this soon after its peers notice
MAX_FAILED_MOVES = 3  # in a row; then the run keeps its size and goes on; after twice as many it has failed


def plan_next(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan the generation that is due, as soon as enough standbys are warm for it."""
    if state.next is not None or state.is_ending:
        return Decision(state)
    if state.current is None:
        return _plan_first(limits, state, seen)
    if any(seen.phase(member) is not Phase.TRAINING for member in state.members):
        return Decision(state)
    change = next_change(limits, state.wish, len(state.members), seen.step, _horizon_steps(seen))
    members = _members_for(state, seen, change.workers) if change else None
    if change is None or members is None:
        return Decision(state)
    why = f"scheduled for step {change.first_step}" if change.first_step is not None else _why(limits, state, seen)
    return _planned(state, seen, members, change, why)


def mend_move(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """The generation to come lost a newcomer, or could not be reached: go on without it.

    Before the fence that costs nothing. After it every old member has stopped, or will: once none trains any more,
    a new generation is planned from the same old state, with other standbys if there are enough, or unchanged.
    """
    if state.next is None or state.current is None:
        return Decision(state)
    broken = _lost_newcomers(state)
    if not broken:
        broken = _failed_movers(state, seen)
        if not broken:
            return Decision(state)
        if state.broken_s is None:
            return Decision(replace(state, broken_s=seen.now_s))
        if seen.now_s - state.broken_s < BLAME_S:
            return Decision(state)
    failed_moves = state.failed_moves + 1
    gives_up = failed_moves >= MAX_FAILED_MOVES
    wish = Wish(len(state.members), seen.step + 1) if gives_up else state.wish
    note = Note("move_abandoned", {"generation": state.next.generation, "why": broken, "gave_up": gives_up})
    counted = replace(state, failed_moves=failed_moves, wish=wish, why=broken, broken_s=None)
    abandoned = Decision(counted, (note,))
    if state.fence is None and all(seen.phase(member) is Phase.TRAINING for member in state.members):
        return abandoned.then(next=None, next_first_step=None, next_why="")
    if not all(_has_stopped(state, seen, member) for member in state.members):
        return Decision(state)
    size = wanted_size(limits, wish, seen.step + 1)
    members = _members_for(counted, seen, size) or state.members
    again = _planned(counted, seen, members, SizeChange(len(members), None), f"after a failed move: {broken}")
    return Decision(replace(again.state, fence=None), abandoned.actions + again.actions)


def raise_fence(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Everybody concerned is connected for the next generation: let the current one end.

    The first generation needs no fence: nobody trains before it.
    """
    if state.next is None or state.current is None or state.fence is not None:
        return Decision(state)
    generation = state.next.generation
    if not all(_prepared(seen, worker) >= generation for worker in state.involved):
        return Decision(state)
    at_step = None if state.next_first_step is None else state.next_first_step - 1
    return Decision(replace(state, fence=Fence(to_generation=generation, at_step=at_step)))


def activate(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Every member of the next generation holds its shard: it becomes the current one.

    From here on the old shards may go. The note is journalled before any worker hears of it.
    """
    plan = state.next
    if plan is None or not all(_is_ready(seen, member, plan.generation) for member in plan.world.members):
        return Decision(state)
    old = state.current.world if state.current else None
    moved_bytes, state_identical = _handed_over(state, seen)
    rescale = Rescale(
        generation=plan.generation,
        from_size=old.size if old else 0,
        to_size=plan.world.size,
        step=seen.step,
        why=state.next_why,
        moved_bytes=moved_bytes,
        state_identical=state_identical,
    )
    moved = old is not None and old.members != plan.world.members
    activated = replace(
        state,
        previous=state.current,
        current=plan,
        activated=plan.generation,
        next=None,
        next_first_step=None,
        next_why="",
        fence=None,
        broken_s=None,
        failed_moves=0 if moved else state.failed_moves,
        failed_spawns=0,
        rescales=(*state.rescales, rescale) if moved else state.rescales,
    )
    note = Note("activated", asdict(rescale) | {"members": list(plan.world.members)})
    return Decision(activated, (note,))


def measure_stalls(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Complete the newest rescales with their stall, once the new world has done a few steps."""
    measured: list[Rescale] = []
    notes: list[Note] = []
    for rescale in state.rescales:
        is_past = rescale.generation != state.activated or seen.progress.watermark + 1 >= limits.steps
        stall = stall_s(seen.progress, rescale.generation, is_past) if rescale.stall_s is None else None
        if stall is not None:
            rescale = replace(rescale, stall_s=stall)
            notes.append(Note("rescaled", asdict(rescale)))
        measured.append(rescale)
    return Decision(replace(state, rescales=tuple(measured)), tuple(notes)) if notes else Decision(state)


def warm_standbys(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Workers of the crew that could join a generation now, oldest first."""
    return tuple(w for w in state.crew if w not in state.members and seen.phase(w) is Phase.STANDBY)


def _plan_first(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    size = wanted_size(limits, state.wish, seen.step + 1)
    members = warm_standbys(state, seen)[:size]
    if len(members) < size:
        return Decision(state)
    world = World(state.num_generations, members)
    placement = Placement.balanced(limits.num_experts, size)
    why = f"goes on after step {state.restore.step}" if state.restore else "the run starts"
    return _with_plan(state, seen, world, placement, SizeChange(size, None), why)


def _planned(state: RunState, seen: Observation, members: tuple[str, ...], change: SizeChange, why: str) -> Decision:
    assert state.current is not None
    old, new = state.current.world, World(state.num_generations, members)
    unchanged = members == old.members
    placement = state.current.placement if unchanged else Placement.rebalanced(state.current.placement, old, new)
    return _with_plan(state, seen, new, placement, change, why)


def _with_plan(
    state: RunState, seen: Observation, world: World, placement: Placement, change: SizeChange, why: str
) -> Decision:
    plan = GenerationPlan(
        epoch=seen.epoch,
        world=world,
        placement=placement,
        source=state.current.world if state.current else None,
        source_placement=state.current.placement if state.current else None,
        store_prefix=f"{seen.epoch}/{world.generation}",
        restore=None if state.current else state.restore,
    )
    fields = {"generation": world.generation, "members": list(world.members), "first_step": change.first_step}
    planned = replace(
        state,
        next=plan,
        next_first_step=change.first_step,
        next_why=why,
        num_generations=world.generation + 1,
    )
    return Decision(planned, (Note("generation_planned", fields | {"why": why}),))


def _members_for(state: RunState, seen: Observation, size: int) -> tuple[str, ...] | None:
    """A world of `size`: old members keep their order, the last leave, warm standbys follow. None: too few are warm."""
    missing = size - len(state.members)
    if missing <= 0:
        return state.members[:size]
    newcomers = warm_standbys(state, seen)
    return state.members + newcomers[:missing] if len(newcomers) >= missing else None


def _why(limits: RunLimits, state: RunState, seen: Observation) -> str:
    if wish_holds(limits, state.wish, seen.step + 1):
        return state.target.reason or "asked for"
    return "scheduled"


def _horizon_steps(seen: Observation) -> int:
    step_s = typical_step_s(seen.progress)
    return max(HORIZON_STEPS, math.ceil(HORIZON_S / step_s)) if step_s else HORIZON_STEPS


def _lost_newcomers(state: RunState) -> str:
    """Who of the world to come is gone, in words; empty if nobody is."""
    assert state.next is not None
    gone = [w for w in state.next.world.members if w not in state.crew]
    return f"{', '.join(gone)} was lost" if gone else ""


def _failed_movers(state: RunState, seen: Observation) -> str:
    """Who could not reach the next generation, in words. They notice before it is known who is to blame."""
    assert state.next is not None
    failed = [
        worker
        for worker in state.involved
        if (report := seen.reports.get(worker)) and report.failed_generation == state.next.generation
    ]
    return f"{', '.join(failed)} could not reach generation {state.next.generation}" if failed else ""


def _has_stopped(state: RunState, seen: Observation, member: str) -> bool:
    """Past the fence and out of the move. A leaver that has given everything away just waits, still MOVING."""
    assert state.next is not None
    leaves = member not in state.next.world
    phase = seen.phase(member)
    return phase in (Phase.STRANDED, Phase.READY) or (leaves and phase is Phase.MOVING)


def _prepared(seen: Observation, worker: str) -> int:
    report = seen.reports.get(worker)
    return report.prepared if report else -1


def _is_ready(seen: Observation, worker: str, generation: int) -> bool:
    report = seen.reports.get(worker)
    return report is not None and report.phase is Phase.READY and report.generation == generation


def _handed_over(state: RunState, seen: Observation) -> tuple[int, bool | None]:
    """Bytes that crossed between workers, and whether every digest taken was equal before and after."""
    assert state.next is not None
    handovers: list[Handover] = [
        handover
        for worker in state.involved
        if worker in seen.reports
        for handover in seen.reports[worker].handovers
        if handover.generation == state.next.generation
    ]
    verdicts = [h.state_identical for h in handovers if h.state_identical is not None]
    return sum(h.received_bytes for h in handovers), all(verdicts) if verdicts else None
