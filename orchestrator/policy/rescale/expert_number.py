"""Changes of the number of experts: a generation of the same members with more or fewer of them. A rule of `lifecycle`.

    change_experts  on request, or before a scheduled step -> plan g+1 -> (transition) READY -> activate

A generation knows the step at which the next one has other experts (`GenerationPlan.until_step`). Its members wait
there if the transition isn't prepared yet, so the change happens at exactly this step, whatever happens to workers.
"""

from dataclasses import replace

from orchestrator.elastic.expert_change import ExpertChange, of_layer
from orchestrator.elastic.expert_placement import ExpertPlacement, Holders
from orchestrator.elastic.world import World
from orchestrator.errors import UsageError
from orchestrator.policy.rescale.generation_plan import (
    MAX_FAILED_TRANSITIONS,
    can_plan,
    nodes_of,
    planned_transition,
    step_of_members,
    with_change_at,
)
from orchestrator.policy.rescale.horizon import horizon_steps
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.expert_changes import next_step_of_change, requested_change, scores_for
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.policy.state.world_size import SizeChange
from orchestrator.protocol.events.training import ExpertsUnchanged
from orchestrator.protocol.messages import ExpertRequest
from orchestrator.protocol.status import RunPhase
from orchestrator.spec.moe.experts import LEAST_MEASURED, is_measured, measured_step, unfit_number


def change_experts(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Plan a generation with another number of experts, if one is due or was asked for. A request counts as applied
    once that generation is active."""
    if not can_plan(state, seen) or state.current is None:
        return Decision(state)
    experts, made = state.current.experts, state.experts.made_by(state.current.generation)
    step = step_of_members(state, seen)
    due = next_step_of_change(limits, state.experts, experts, made)
    if due is not None and due <= step + 1 + horizon_steps(seen):
        decided, change = with_change_at(limits, state, seen, due, experts, made)
        if change is None:  # it can't be decided yet
            return Decision(state)
        return _planned(limits, decided, seen, change, f"scheduled for step {due}")
    request = state.target.experts
    if request.number <= state.experts.requests:
        return Decision(state)
    if why := _why_not(limits, state, seen):
        heard = replace(state, experts=replace(state.experts, requests=request.number))
        return Decision(heard, (ExpertsUnchanged(seen.step, experts.num_experts, why, request.number),))
    change = requested_change(limits, experts, request, seen.experts)
    return _planned(limits, state, seen, change, state.target.reason or "asked for")


def _planned(limits: RunLimits, state: RunState, seen: Observation, change: ExpertChange, why: str) -> Decision:
    assert state.current is not None
    world, nodes = World(state.num_generations, state.members), nodes_of(seen, state.members)
    placement = with_experts(state.current.placement, change, limits.moe_layers, state.current.world, world, nodes)
    step = change.first_step if change.first_step >= 0 else None
    resized = SizeChange(len(state.members), step)
    return planned_transition(limits, state, seen, state.members, resized, why, placement, experts=change)


def with_experts(
    was: ExpertPlacement, change: ExpertChange, layers: tuple[str, ...], old: World, new: World, nodes: tuple[str, ...]
) -> ExpertPlacement:
    """A balanced placement of the experts after a change, with each as near as may be to the one that it comes from.

    Args:
        layers: names of the layers that may have placements of their own.
        nodes: by rank of `new`, the node that it runs on; empty if unknown.
    """

    def held(layer: str, sources: tuple[int, ...]) -> Holders:
        before = was.holders_of(layer)
        return tuple(before[source] for source in sources)

    by_layer: tuple[tuple[str, Holders], ...] = ()
    if was.layers or len(change.sources) > 1:
        by_layer = tuple((layer, held(layer, of_layer(change.sources, n))) for n, layer in enumerate(layers))
    near = ExpertPlacement(change.num_experts, was.world_size, held("", change.sources[0]), by_layer)
    return ExpertPlacement.rebalanced(near, old, new, nodes)


def _why_not(limits: RunLimits, state: RunState, seen: Observation) -> str:
    """Why a request changes nothing; empty if it does."""
    assert state.current is not None
    request, experts = state.target.experts, state.current.experts
    if state.failures.transitions >= MAX_FAILED_TRANSITIONS:
        return "the newest changes of the workers or of the experts have failed"
    if seen.step + 1 >= limits.steps:
        return "the run is at its end"
    if request.num_experts == experts.num_experts and not (request.dissolve and experts.families):
        return f"it has {experts.num_experts} experts already"
    return unfit_number(experts.num_experts, request.num_experts, limits.top_k)


def check_request(
    limits: RunLimits, state: RunState, seen: Observation, phase: RunPhase, request: ExpertRequest
) -> None:
    """Raises UsageError if a run can't get this number of experts now.

    Args:
        phase: of the run.
    """
    why, remedy = _why_refused(limits, state, seen, phase, request)
    if why:
        raise UsageError(
            f"run {limits.run_id} can't get {request.num_experts} experts in each layer: {why}",
            remedy=remedy,
            unchanged=f"{limits.run_id} continues unchanged.",
        )


def _why_refused(
    limits: RunLimits, state: RunState, seen: Observation, phase: RunPhase, request: ExpertRequest
) -> tuple[str, str]:
    """The reason and the remedy; empty if nothing is against it."""
    if phase is not RunPhase.TRAINING or state.current is None:
        return f"it is {phase}, not training", "Ask again once it trains."
    for key, why in limits.fixes_experts.items():
        return f"its job has model.{key}, with which the number can't change: {why}", "Submit a job without."
    for name in limits.follows_placement:
        return f"with communication.{name} a token may find only clones of one expert", "Submit a job without."
    experts = state.current.experts
    if request.num_experts == experts.num_experts and not (request.dissolve and experts.families):
        families = "" if not experts.families else ", in families of clones"
        return f"it has {experts.num_experts}{families}", "Name another number" + ", or --dissolve." * bool(families)
    if why := unfit_number(experts.num_experts, request.num_experts, limits.top_k):
        fits = f"from {limits.top_k} to {experts.num_experts - 1}, or a multiple of {experts.num_experts}"
        return why, f"Name a number {fits}."
    before = request.num_experts
    for entry in limits.expert_schedule:
        if entry.at_step > seen.step + 1:
            at = f"from step {entry.at_step} on"
            if why := unfit_number(before, entry.num_experts, limits.top_k):
                scheduled = f"its schedule has {entry.num_experts} {at}"
                return f"{scheduled}, and {why}", "Name a number that the schedule can follow."
            if is_measured(entry, before):
                if measured_step(entry.at_step) not in limits.measured_steps:
                    why = f"its schedule would leave out some of them {at}, by what isn't measured for that"
                    return why, "Name a number that isn't larger than the scheduled one."
                if measured_step(entry.at_step) - LEAST_MEASURED < seen.step:
                    why = f"its schedule leaves out experts {at}, by what is measured of the present ones"
                    return why, f"Ask again after step {entry.at_step}."
            before = entry.num_experts
    if request.num_experts < experts.num_experts and request.keep != "random":
        scores_LE = scores_for(request.keep, seen.experts)
        if scores_LE.ndim != 2 or scores_LE.shape[1] != experts.num_experts:
            of = "how much each adds" if request.keep == "reap" else "how many tokens each gets"
            measured = ": its job has experts.saliency false" if not limits.keeps_saliency else ""
            why = f"{of} is not known yet of its {experts.num_experts} experts" + measured * (request.keep == "reap")
            return why, "Ask again after some steps, or name another --keep."
    return "", ""
