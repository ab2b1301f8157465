"""Contents of the next generation's plan: members, placement, source, buddies. Used by the rules that plan one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.snapshot_layout import buddies_of, second_buddies_of
from orchestrator.elastic.world import World
from orchestrator.policy.health.leaving import leavers
from orchestrator.policy.rescale.load_placement import better_placed
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.expert_changes import experts_at, is_decidable, next_step_of_change, scheduled_change
from orchestrator.policy.state.run_parts import Rebalance, Transition
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange, SizeRequest
from orchestrator.protocol.events.generations import GenerationPlanned, TransitionAbandoned
from orchestrator.protocol.messages import GenerationPlan, StateSource
from orchestrator.protocol.worker_phase import Phase
from orchestrator.sampling.micro_batches import MicroBatchSize
from orchestrator.spec.moe.experts import BY_LOAD

BLAME_S = 1.0  # a dead process or rendezvous store is identified within this after its peers notice
MAX_FAILED_TRANSITIONS = 3  # in a row; then the run keeps its size and continues; after twice as many it fails


def warm_standbys(state: RunState, seen: Observation) -> tuple[str, ...]:
    """Workers of the group that could join a generation now, oldest first, without those that leave soon. Where no
    world has the state, this includes workers left from one and workers ready for one that was abandoned."""
    idle = (Phase.STANDBY,) if state.current is not None else (Phase.STANDBY, Phase.STRANDED, Phase.READY)
    out = {*state.members, *leavers(state, seen)}
    return tuple(w for w in state.worker_group if w not in out and seen.phase(w) in idle)


def nodes_of(seen: Observation, workers: Iterable[str]) -> tuple[str, ...]:
    """The node of each worker; empty text where it is unknown."""
    return tuple(seen.nodes.get(worker, "") for worker in workers)


def node_by_node(seen: Observation, workers: Sequence[str]) -> tuple[str, ...]:
    """The workers grouped by node, in rank order: weights are gathered from neighbour to neighbour, so few neighbours
    should be on different nodes."""
    first = list(nodes_of(seen, workers))
    return tuple(sorted(workers, key=lambda worker: first.index(seen.nodes.get(worker, ""))))


def can_plan(state: RunState, seen: Observation) -> bool:
    """Whether another generation may be planned now: all members train, and no other transition is under way."""
    if state.current is None or state.next is not None or state.is_ending or state.is_recovering:
        return False
    return seen.store_address is not None and all(seen.phase(w) is Phase.TRAINING for w in state.members)


def members_for(state: RunState, seen: Observation, size: int) -> tuple[str, ...] | None:
    """Members of a world of `size`. Old members keep their order; leavers are dropped first, then the last ranks. Warm
    standbys are appended, grouped by node. None: too few are warm."""
    missing = size - len(state.members)
    if missing <= 0:
        leaving = leavers(state, seen)
        kept = sorted(state.members, key=lambda worker: worker in leaving)[:size]
        return tuple(worker for worker in state.members if worker in kept)
    newcomers = warm_standbys(state, seen)
    return state.members + node_by_node(seen, newcomers[:missing]) if len(newcomers) >= missing else None


def abandoned(state: RunState, seen: Observation, generation: int, why: str, keeps_request: bool = False) -> Decision:
    """Count a failed transition; after several in a row the run keeps its size, if it has one already."""
    failures = replace(state.failures, transitions=state.failures.transitions + 1)
    gives_up = failures.transitions >= MAX_FAILED_TRANSITIONS and state.current is not None
    size_request = _given_up(state, seen) if gives_up and not keeps_request else state.size_request
    note = TransitionAbandoned(generation, why, gives_up)
    return Decision(replace(state, failures=failures, size_request=size_request, why=why), (note,))


def _given_up(state: RunState, seen: Observation) -> SizeRequest:
    """The size request after several failed transitions: the present size, until another one is requested. Where
    members were to leave, the request is unchanged: their departure does not change the wanted size."""
    if state.size_request is not None and any(worker in state.leaving for worker in state.members):
        return state.size_request
    plain = state.size_request or SizeRequest(0, 0)
    return replace(plain, workers=len(state.members), since_step=seen.step + 1, grown_s=seen.now_s)


def without_store(state: RunState, seen: Observation) -> str:
    """Why the next generation can't connect even if all its workers are alive: its rendezvous store is gone, and some
    worker has yet to connect there. Empty if it can, or while there is no other store to plan a replacement with."""
    plan = state.next
    if plan is None or seen.store_address in (None, plan.store_address):
        return ""
    is_late = any(seen.report(worker).transition.prepared < plan.generation for worker in plan.involved)
    return f"the rendezvous store of generation {plan.generation} was lost" if is_late else ""


def is_blame_due(state: RunState, seen: Observation) -> bool:
    """Whether a transition has failed for long enough to know the culprit, which is not the first to report it."""
    since_s = state.transition.failing_since_s if state.transition is not None else None
    return since_s is not None and seen.now_s - since_s >= BLAME_S


def planned_transition(
    limits: RunLimits,
    state: RunState,
    seen: Observation,
    members: tuple[str, ...],
    change: SizeChange,
    why: str,
    placement: ExpertPlacement | None = None,
    rebalance: Rebalance | None = None,
    experts: ExpertChange | None = None,
) -> Decision:
    """The state with a transition from the current world to one of these members.

    Args:
        placement: of experts; None for the present one, dealt to new members if there are any.
        rebalance: what it changes of the placement, if that is its purpose.
        experts: what it changes of the number of experts, in the placement too.
    """
    assert state.current is not None
    old, new = state.current.world, World(state.num_generations, members)
    unchanged = members == old.members
    was = state.current.placement
    if placement is None:
        nodes = nodes_of(seen, members)
        placement = was if unchanged else ExpertPlacement.rebalanced(was, old, new, nodes)
        if not unchanged and limits.placement.policy == BY_LOAD:
            placement = better_placed(limits, seen, placement, nodes)
    source = StateSource(old, was, holders=old.members)
    return with_plan(limits, state, seen, new, placement, source, change, why, rebalance, experts)


def micro_batch_for(limits: RunLimits, state: RunState, world: World) -> MicroBatchSize:
    """Micro-batch size of the next generation: the decided one, else the present one. Where it is fitted to memory, a
    smaller world begins with a smaller one: each of its workers holds more of the state."""
    last = state.current or state.previous
    size = state.micro_batch.size or (last.micro_batch if last is not None else limits.micro_batch)
    if not limits.fits_memory:
        return size
    shrunk = min(1.0, world.size / last.world.size) if last is not None else 1.0
    least = min(size.tokens, limits.micro_batch.tokens)
    return replace(size, tokens=max(least, int(size.tokens * shrunk)), multiple=world.size)


def with_plan(
    limits: RunLimits,
    state: RunState,
    seen: Observation,
    world: World,
    placement: ExpertPlacement,
    source: StateSource | None,
    change: SizeChange,
    why: str,
    rebalance: Rebalance | None = None,
    experts: ExpertChange | None = None,
) -> Decision:
    """The state with this generation as the next one. Requires a rendezvous store."""
    assert seen.store_address is not None
    before, made = _experts_of_source(limits, state, source)
    now = before if experts is None else before.after(experts)
    changes = state.experts
    if experts is not None and experts.first_step >= 0:
        made = experts.first_step
    elif experts is not None:  # a new change, which replaces later ones of a past that the run has left
        made = step_of_members(state, seen) + 1
        changes = replace(changes, decided=())
    nodes = nodes_of(seen, world.members)
    buddies = buddies_of(nodes) if limits.protected else ()
    plan = GenerationPlan(
        term=seen.term,
        world=world,
        placement=placement,
        source=source,
        store_prefix=f"{seen.term}/{world.generation}",
        store_address=seen.store_address,
        buddies=buddies,
        second_buddies=second_buddies_of(nodes, buddies) if buddies and limits.copies > 1 else (),
        restore=state.restore if source is None else None,
        micro_batch=micro_batch_for(limits, state, world),
        skips=state.failures.skips,
        nodes=nodes,
        change=experts,
        families=now.families,
        until_step=next_step_of_change(limits, changes, now, made),
    )
    planned = replace(
        state,
        transition=Transition(plan, change.first_step, why, rebalance=rebalance),
        num_generations=world.generation + 1,
    )
    return Decision(planned, (GenerationPlanned(world.generation, world.members, change.first_step, why),))


def _experts_of_source(limits: RunLimits, state: RunState, source: StateSource | None) -> tuple[ExpertSet, int]:
    """The experts of the state that a generation begins from, and the first step of the newest change in it."""
    if source is None:
        step = state.restore.step if state.restore is not None else -1
        return experts_at(limits, state.experts, step), state.experts.newest_until(step)
    origin = next(plan for plan in (state.current, state.previous) if plan is not None and plan.world == source.world)
    return origin.experts, state.experts.made_by(origin.generation)


def step_of_members(state: RunState, seen: Observation) -> int:
    """The newest step that members have finished: others may have stopped in steps that were undone since."""
    return max((seen.report(worker).step for worker in state.members), default=seen.step)


def with_change_at(
    limits: RunLimits, state: RunState, seen: Observation, step: int, experts: ExpertSet, made: int
) -> tuple[RunState, ExpertChange | None]:
    """The change of the number of experts with which a step begins, and the state in which it is decided; None: there
    is none, or it can't be decided yet and the next generation waits for that.

    Args:
        experts, made: of the state before the step, and the first step of the newest change in it.
    """
    if step <= made:
        return state, None
    change = state.experts.at(step)
    if change is not None:
        return state, change
    if not is_decidable(limits, experts, step, seen.experts):
        return state, None
    change = scheduled_change(limits, experts, step, seen.experts)
    if change is None:
        return state, None
    return replace(state, experts=replace(state.experts, decided=state.experts.with_new(change))), change
