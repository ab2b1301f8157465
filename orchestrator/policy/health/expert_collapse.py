"""When a run's experts collapse, or their loads swing, and what a user should do. Pure."""

from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum
from typing import Any

from orchestrator.policy.health.expert_load import largest_violation
from orchestrator.policy.state.run_state import Note
from orchestrator.protocol.messages import StepRecord
from orchestrator.spec.model import EMBEDDING_SCALE, ModelSpec

# With the defaults and 8 experts the worst layer was at 0.17 of the largest MaxVio on average from step 30 on, and the
# swing at 0.01; with the sign rule at 0.001 at 0.99, at 0.05 the swing at 0.36, at 0.3 at 0.65.
COLLAPSED = 0.5  # of the largest possible MaxVio
SWINGING = 0.25  # of all experts
SETTLED_STEPS = 30  # before which routers are uneven because they begin so
LASTING_STEPS = 20  # that are looked at: a single batch can be uneven
ENOUGH_STEPS = 15  # of them begin a trouble, and as many others end it
TOKENS_PER_EXPERT = 4  # of a global batch: with fewer, even random choices look uneven


class Trouble(StrEnum):
    """What can be wrong with the routers' choices: the kinds of the events with which it begins."""

    COLLAPSE = "experts_collapsed"  # most tokens of a layer go to the same experts
    SWING = "loads_swing"  # experts are full and empty by turns


ENDS = {Trouble.COLLAPSE: "experts_even", Trouble.SWING: "loads_steady"}  # kinds of the events with which it is over


def routing_news(model: ModelSpec, records: Sequence[StepRecord], known: Collection[str]) -> list[Note]:
    """The troubles that have begun or ended with the newest of these steps, as events.

    A trouble begins, and ends, when `ENOUGH_STEPS` of the newest `LASTING_STEPS` say so. Steps that say nothing are
    left out: those before the routers have settled, those without tokens (a batch that was left out), and those with
    very few.

    Args:
        records: the newest ones, in order.
        known: kinds of the troubles that have begun and not ended.
    """
    steps = [
        record
        for record in records
        if record.step >= SETTLED_STEPS
        and record.experts.worst_layer >= 0
        and record.tokens >= TOKENS_PER_EXPERT * model.num_experts
    ]
    largest = largest_violation(model.num_experts, model.top_k)
    collapses = _news(Trouble.COLLAPSE, steps, known, lambda r: r.experts.worst_violation > COLLAPSED * largest > 0)
    compared = [record for record in steps if record.experts.swing is not None]  # with the step before
    swings = _news(Trouble.SWING, compared, known, lambda r: (r.experts.swing or 0.0) > SWINGING)
    return collapses + swings


def _news(
    trouble: Trouble, steps: Sequence[StepRecord], known: Collection[str], is_bad: Callable[[StepRecord], bool]
) -> list[Note]:
    was_bad = trouble in known
    rows = []  # the newest one, and those before it that say the same: many steps may have come at once
    for end in range(len(steps), 0, -1):
        changed = [record for record in steps[max(end - LASTING_STEPS, 0) : end] if is_bad(record) is not was_bad]
        if len(changed) < ENOUGH_STEPS:
            break
        rows.append(changed)
    if not rows:
        return []
    first, newest = rows[-1][0].step, rows[0][-1].experts
    if was_bad:
        return [Note(ENDS[trouble], {"step": first})]
    if trouble is Trouble.SWING:
        return [Note(trouble.value, {"step": first, "swing": newest.swing})]
    return [Note(trouble.value, {"step": first, "layer": newest.worst_layer, "max_violation": newest.worst_violation})]


def routing_warnings(model: ModelSpec, events: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a user should know of troubles that go on, from the events with which they began, by kind."""
    swings = Trouble.SWING in events
    warnings = [_collapse(model, events[Trouble.COLLAPSE], swings)] if Trouble.COLLAPSE in events else []
    return warnings + ([_swing(model, events[Trouble.SWING])] if swings else [])


def _collapse(model: ModelSpec, event: Mapping[str, Any], swings: bool) -> str:
    """Where loads also swing, a layer is full and empty by turns: what calms them helps, a faster bias doesn't."""
    largest = largest_violation(model.num_experts, model.top_k)
    return (
        f"MoE layer {event['layer']} has collapsed since step {event['step']}, most of its tokens go to the same "
        f"experts: its MaxVio was {event['max_violation']:.2f} of {largest:.2f} possible, where at most "
        f"{COLLAPSED * largest:.2f} is expected. In the job of a new run, "
        f"{_steadier(model) if swings else _more_even(model)} (docs/balance.md)"
    )


def _swing(model: ModelSpec, event: Mapping[str, Any]) -> str:
    return (
        f"the loads of experts swing since step {event['step']}: {event['swing']:.0%} of the experts went from well "
        f"above the mean load to well below it, or back, from one step to the next, where at most {SWINGING:.0%} is "
        f"expected. In the job of a new run, {_steadier(model)}"
    )


def _steadier(model: ModelSpec) -> str:
    """What calms swinging loads: a smaller move of the bias, if one moves."""
    if model.bias_update_speed > 0:
        return f"lower model.bias_update_speed, which is {model.bias_update_speed:g}"
    return "lower train.lr"


def _more_even(model: ModelSpec) -> str:
    """What evens out choices that have collapsed, by what the job has of it."""
    if model.router == "softmax" and not model.bias_update_speed:
        return f"raise model.balance_loss_weight, which is {model.balance_loss_weight:g}"
    if not model.bias_update_speed:
        advice = "set model.bias_update_speed, which is 0"
    elif model.bias_update == "sign":
        advice = "set model.bias_update to quantile, which follows scores however fast they move"
    else:
        advice = f"raise model.bias_update_speed, which is {model.bias_update_speed:g}, up to 1, or lower train.lr"
    if model.init_from is None and model.entrypoint is None and model.embedding_scale < EMBEDDING_SCALE:
        advice += f"; raise model.embedding_scale, which is {model.embedding_scale:g}, to {EMBEDDING_SCALE:g}"
    return advice
