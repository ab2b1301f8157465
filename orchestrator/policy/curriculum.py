"""Decisions on curriculum stages that don't follow from the job alone. Rules of `lifecycle`.

A stage is decided by hand, or because the one before has reached its end: a validation loss, or a plateau. It begins
some steps ahead, so that every member receives it in time; if one doesn't, none begins it, and it is decided again.
"""

import math
from dataclasses import replace

from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress, typical_step_s
from orchestrator.policy.state.run_state import Decision, Observation, RunState
from orchestrator.protocol.events.training import StageDecided, StageKept
from orchestrator.protocol.messages import StageStart
from orchestrator.spec.curriculum import CurriculumSpec, StageSpec

NEXT = "next"
HEARD_S = 2.0  # every member receives a directive within this
AHEAD = 3  # steps more: a decision is followed two votes before its first step
BETTER = 0.005  # a validation loss that is lower by this share is no plateau


def decide_stages(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Decide the next stage if it was asked for, if the present one has reached its end, or if it didn't begin.

    One at a time: requests that arrive meanwhile wait.
    """
    spec, progress = limits.curriculum, seen.progress
    if spec is None or state.current is None or state.is_recovering or state.is_ending or not progress.stage:
        return Decision(state)
    newest = state.curriculum.stages[-1] if state.curriculum.stages else None
    if newest is not None and newest.first_step > progress.watermark:
        return Decision(state)
    if newest is not None and _missed(newest, progress):
        without = replace(state, curriculum=replace(state.curriculum, stages=state.curriculum.stages[:-1]))
        return _decided(limits, without, seen, newest.name, newest.after, f"it did not begin at {newest.first_step}")
    after = following(spec, progress.stage)
    if state.target.stage_requests > state.curriculum.requests:
        applied = replace(state, curriculum=replace(state.curriculum, requests=state.target.stage_requests))
        by_name = state.target.stage != NEXT
        name = state.target.stage if by_name else after
        if name is None or name == progress.stage:
            why = f"{progress.stage} is the last stage" if name is None else f"{name} is the present stage"
            return Decision(applied, (StageKept(progress.stage, why),))
        ends = "" if by_name else progress.stage
        return _decided(limits, applied, seen, name, ends, state.target.reason or "asked for")
    present = next((stage for stage in spec.stages if stage.name == progress.stage), None)
    if present is None or after is None or not (why := _reached(present, progress)):
        return Decision(state)
    return _decided(limits, state, seen, after, progress.stage, why)


def following(spec: CurriculumSpec, stage: str) -> str | None:
    """The job's stage after this one; None after the last. Before the first step the first one counts as present."""
    names = [s.name for s in spec.stages]
    place = names.index(stage) if stage in names else 0
    return names[place + 1] if place + 1 < len(names) else None


def _decided(limits: RunLimits, state: RunState, seen: Observation, name: str, after: str, why: str) -> Decision:
    step_s = typical_step_s(seen.progress) or 0.0
    first_step = seen.step + 1 + AHEAD + (math.ceil(HEARD_S / step_s) if step_s > 0 else 0)
    if first_step >= limits.steps:
        return Decision(state)
    stages = (*state.curriculum.stages, StageStart(name, first_step, after))
    decided = replace(state, curriculum=replace(state.curriculum, stages=stages, version=state.curriculum.version + 1))
    return Decision(decided, (StageDecided(name, first_step, why),))


def _missed(start: StageStart, progress: Progress) -> bool:
    """Whether the run has passed the first step of a stage without it, in the stage that it was to end."""
    was_in = progress.stage_at(start.first_step)
    return was_in != start.name and start.after in ("", was_in)


def _reached(stage: StageSpec, progress: Progress) -> str:
    """Why a stage is to end now; empty if it isn't."""
    if stage.until is None:
        return ""
    losses = [loss for step, loss in progress.validations if step >= progress.stage_step]
    below, plateau = stage.until.validation_below, stage.until.plateau
    if below is not None and losses and losses[-1] < below:
        return f"the validation loss is {losses[-1]:.4f}, below {below:g}"
    if plateau is not None and len(losses) > plateau:
        best = min(losses[:-plateau])
        if min(losses[-plateau:]) > best * (1 - BETTER):
            return f"{plateau} validations in a row were not better than {best:.4f}"
    return ""
