"""Detection of collapsed experts and swinging loads, with advice for the user. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orchestrator.policy.health.expert_load import largest_violation
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.notices import ExpertsCollapsed, ExpertsEven, LoadsSteady, LoadsSwing
from orchestrator.protocol.expert_load import ExpertLoad
from orchestrator.protocol.step_record import StepRecord
from orchestrator.spec.model import EMBEDDING_SCALE, ModelSpec

# With the defaults and 8 experts the worst layer was at 0.17 of the largest MaxVio on average from step 30 on, and the
# swing at 0.01; with the sign rule at 0.001 at 0.99, at 0.05 the swing at 0.36, at 0.3 at 0.65.
COLLAPSED = 0.5  # of the largest possible MaxVio
SWINGING = 0.25  # of all experts
SETTLED_STEPS = 30  # before this routers are uneven from initialisation
LASTING_STEPS = 20  # looked at together: a single batch can be uneven
ENOUGH_STEPS = 15  # of them that begin a trouble, and as many that end it
TOKENS_PER_EXPERT = 4  # of a global batch: with fewer, even random choices look uneven


@dataclass(frozen=True)
class Troubles:
    """Present troubles of the routers, each with the event that began it."""

    collapse: ExpertsCollapsed | None = None
    swing: LoadsSwing | None = None

    def after(self, event: Event) -> "Troubles":
        """The troubles after this event."""
        match event:
            case ExpertsCollapsed():
                return replace(self, collapse=event)
            case ExpertsEven():
                return replace(self, collapse=None)
            case LoadsSwing():
                return replace(self, swing=event)
            case LoadsSteady():
                return replace(self, swing=None)
        return self

    def up_to(self, step: int) -> "Troubles":
        """Those that began no later than this step: a run that goes back forgets later ones."""
        collapse = self.collapse if self.collapse is not None and self.collapse.step <= step else None
        return Troubles(collapse, self.swing if self.swing is not None and self.swing.step <= step else None)


def routing_news(model: ModelSpec, records: Sequence[StepRecord], known: Troubles) -> list[Event]:
    """Events for troubles that began or ended with the newest of these steps.

    A trouble begins, and ends, when `ENOUGH_STEPS` of the newest `LASTING_STEPS` agree on it. Steps without evidence
    are left out: those before the routers have settled, those without tokens (a batch that was left out), and those
    with very few.

    Args:
        records: the newest ones, in order.
        known: troubles that have begun and not ended.
    """
    steps = [
        record
        for record in records
        if record.step >= SETTLED_STEPS
        and record.routing.experts.worst_layer >= 0
        and record.batch.tokens >= TOKENS_PER_EXPERT * _number(record.routing.experts, model)
    ]
    news: list[Event] = []
    change = _change(steps, known.collapse is not None, lambda r: _is_collapsed(r.routing.experts, model))
    if change is not None:
        first, newest = change
        begun = ExpertsCollapsed(first, newest.worst_layer, newest.worst_violation, newest.num_experts)
        news.append(begun if known.collapse is None else ExpertsEven(first))
    compared = [record for record in steps if record.routing.experts.swing is not None]  # with the step before
    change = _change(compared, known.swing is not None, lambda r: (r.routing.experts.swing or 0.0) > SWINGING)
    if change is not None:
        first, newest = change
        news.append(LoadsSwing(first, newest.swing or 0.0) if known.swing is None else LoadsSteady(first))
    return news


def _number(load: ExpertLoad, model: ModelSpec) -> int:
    return load.num_experts or model.n_routed_experts  # records of earlier versions have none


def _is_collapsed(load: ExpertLoad, model: ModelSpec) -> bool:
    return load.worst_violation > COLLAPSED * largest_violation(_number(load, model), model.num_experts_per_tok) > 0


def _change(
    steps: Sequence[StepRecord], was_bad: bool, is_bad: Callable[[StepRecord], bool]
) -> tuple[int, ExpertLoad] | None:
    """First step of a lasting change, and the loads of the newest step that shows it; None without one."""
    rows = []  # the newest window and those before it that agree: many steps may arrive at once
    for end in range(len(steps), 0, -1):
        changed = [record for record in steps[max(end - LASTING_STEPS, 0) : end] if is_bad(record) is not was_bad]
        if len(changed) < ENOUGH_STEPS:
            break
        rows.append(changed)
    return (rows[-1][0].step, rows[0][-1].routing.experts) if rows else None


def routing_warnings(model: ModelSpec, troubles: Troubles) -> list[str]:
    """Warnings for the user about present troubles, with advice."""
    swings = troubles.swing is not None
    warnings = [] if troubles.collapse is None else [_collapse(model, troubles.collapse, swings)]
    return warnings + ([] if troubles.swing is None else [_swing(model, troubles.swing)])


def _collapse(model: ModelSpec, event: ExpertsCollapsed, swings: bool) -> str:
    """Warning of a collapse. If loads also swing, a layer fills and empties by turns: damp them, keep the bias slow."""
    largest = largest_violation(event.num_experts or model.n_routed_experts, model.num_experts_per_tok)
    return (
        f"MoE layer {event.layer} has collapsed since step {event.step}, most of its tokens go to the same "
        f"experts: its MaxVio was {event.max_violation:.2f} of {largest:.2f} possible, where at most "
        f"{COLLAPSED * largest:.2f} is expected. In the job of a new run, "
        f"{_steadier(model) if swings else _more_even(model)} (docs/balance.md)"
    )


def _swing(model: ModelSpec, event: LoadsSwing) -> str:
    return (
        f"the loads of experts swing since step {event.step}: {event.swing:.0%} of the experts went from well "
        f"above the mean load to well below it, or back, from one step to the next, where at most {SWINGING:.0%} is "
        f"expected. In the job of a new run, {_steadier(model)}"
    )


def _steadier(model: ModelSpec) -> str:
    """Advice that damps swinging loads: a slower bias update, if there is one."""
    if model.bias_update_speed > 0:
        return f"lower model.bias_update_speed, which is {model.bias_update_speed:g}"
    return "lower train.lr"


def _more_even(model: ModelSpec) -> str:
    """Advice against a collapse, by the job's means of balancing."""
    if model.impl == "transformers":
        by_bias = f"raise model.bias_update_speed, which is {model.bias_update_speed:g}, if its routers have a bias"
        return f"{by_bias}, else model.router_aux_loss_coef, which is {model.router_aux_loss_coef:g}, or lower train.lr"
    if model.scoring_func == "softmax" and not model.bias_update_speed:
        return f"raise model.router_aux_loss_coef, which is {model.router_aux_loss_coef:g}"
    if not model.bias_update_speed:
        advice = "set model.bias_update_speed, which is 0"
    elif model.bias_update == "sign":
        advice = "set model.bias_update to quantile, which follows scores however fast they move"
    else:
        advice = f"raise model.bias_update_speed, which is {model.bias_update_speed:g}, up to 1, or lower train.lr"
    if model.init_from is None and model.is_native and model.embedding_scale < EMBEDDING_SCALE:
        advice += f"; raise model.embedding_scale, which is {model.embedding_scale:g}, to {EMBEDDING_SCALE:g}"
    return advice
