"""Which stage of its curriculum a run is to be in, where that doesn't follow from the job alone. Rules of `lifecycle`.

A stage is decided by hand, or because the one before has reached its end: a validation loss, or a plateau. It begins
some steps ahead, so that every member hears of it before; if one doesn't, none begins it, and it is decided again.
"""

import math
from dataclasses import replace

from orchestrator.policy.limits import RunLimits
from orchestrator.policy.progress import Progress, typical_step_s
from orchestrator.policy.run_state import Decision, Note, Observation, RunState
from orchestrator.protocol.messages import StageStart
from orchestrator.spec.curriculum import CurriculumSpec, StageSpec

NEXT = "next"
HEARD_S = 2.0  # every member hears of a directive within this
AHEAD = 3  # steps more: a decision is followed two votes before its first step
BETTER = 0.005  # a validation loss that is lower by this share is no plateau


def decide_stages(limits: RunLimits, state: RunState, seen: Observation) -> Decision:
    """Decide the next stage if it was asked for, if the present one has reached its end, or if it didn't begin."""
    spec = limits.curriculum
    if spec is None or state.current is None or state.is_recovering or state.is_ending:
        return Decision(state)
    progress, pending = seen.progress, _pending(state, seen.progress)
    if state.target.stage_wishes > state.stage_wishes:
        asked = following(spec, progress.stage) if state.target.stage == NEXT else state.target.stage
        heard = replace(state, stage_wishes=state.target.stage_wishes)
        if asked is None:
            return Decision(heard)
        return _decided(limits, heard, seen, asked, state.target.reason or "asked for")
    if pending is not None:
        return Decision(state)
    if (missed := _missed(state, progress)) is not None:
        return _decided(limits, state, seen, missed.name, f"it did not begin at step {missed.first_step}")
    present = next((stage for stage in spec.stages if stage.name == progress.stage), None)
    after = following(spec, progress.stage)
    if present is None or after is None or not (why := _reached(present, progress)):
        return Decision(state)
    return _decided(limits, state, seen, after, why)


def following(spec: CurriculumSpec, stage: str) -> str | None:
    """The stage that the job names behind this one; None behind the last. Before the first step the first one counts as
    present."""
    names = [s.name for s in spec.stages]
    place = names.index(stage) if stage in names else 0
    return names[place + 1] if place + 1 < len(names) else None


def _decided(limits: RunLimits, state: RunState, seen: Observation, name: str, why: str) -> Decision:
    step_s = typical_step_s(seen.progress) or 0.0
    first_step = seen.step + 1 + AHEAD + (math.ceil(HEARD_S / step_s) if step_s > 0 else 0)
    if first_step >= limits.steps:
        return Decision(state)
    missed = _missed(state, seen.progress)
    begun = tuple(s for s in state.stages if s.first_step <= seen.progress.watermark and s != missed)
    decided = replace(state, stages=(*begun, StageStart(name, first_step)), stages_version=state.stages_version + 1)
    return Decision(decided, (Note("stage_decided", {"stage": name, "first_step": first_step, "why": why}),))


def _pending(state: RunState, progress: Progress) -> StageStart | None:
    """The newest decision, as long as it is not known whether it was followed."""
    newest = state.stages[-1] if state.stages else None
    return newest if newest is not None and newest.first_step > progress.watermark else None


def _missed(state: RunState, progress: Progress) -> StageStart | None:
    """The newest decision if the run has passed its first step in another stage."""
    newest = state.stages[-1] if state.stages else None
    if newest is None:
        return None
    record = next((r for r in progress.recent if r.step == newest.first_step), None)
    return newest if record is not None and record.stage != newest.name else None


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
