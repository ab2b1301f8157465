"""Changes of the number of experts that are decided, and the next one that is due. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, OfLayers, cloned, kept, set_at
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.messages import ExpertRequest
from orchestrator.protocol.step_record import Saliency
from orchestrator.spec.moe.experts import ScheduledExperts, is_measured, measured_step, unfit_number

NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class Known:
    """What is known of a run's experts.

    Args:
        watermark: the newest published step.
        saliency: averages of experts by step, ascending.
        loads_LE: tokens of each expert lately; empty if unknown.
    """

    watermark: int
    saliency: tuple[tuple[int, Saliency], ...] = ()
    loads_LE: NDArray[np.float64] = field(default_factory=lambda: NOTHING)


NEVER = -1  # first step of the newest change of a state without any
GENERATIONS_KEPT = 4


@dataclass(frozen=True)
class ExpertChanges:
    """Decisions on the number of experts.

    Args:
        requests: number of requests that were applied.
        decided: in the order of their steps, one at a step. A run that goes back behind one repeats it there.
        made: (generation, first step of the newest change that its state contains) of the newest generations. Right
            after a change that is a step that no generation has done yet.
    """

    requests: int = 0
    decided: tuple[ExpertChange, ...] = ()
    made: tuple[tuple[int, int], ...] = ()

    def at(self, step: int) -> ExpertChange | None:
        """The decided change with which a step begins."""
        return next((change for change in self.decided if change.first_step == step), None)

    def made_by(self, generation: int) -> int:
        """The first step of the newest change that a generation's state contains."""
        return dict(self.made).get(generation, NEVER)

    def newest_until(self, step: int) -> int:
        """The first step of the newest change of which a state after this step was made."""
        return max((change.first_step for change in self.decided if change.first_step <= step), default=NEVER)

    def with_made(self, generation: int, first_step: int) -> "ExpertChanges":
        """With what the state of another generation contains."""
        return replace(self, made=(*self.made, (generation, first_step))[-GENERATIONS_KEPT:])

    def with_new(self, change: ExpertChange) -> tuple[ExpertChange, ...]:
        """The decisions with another one, whose step is known, in place of one at the same step."""
        others = (each for each in self.decided if each.first_step != change.first_step)
        return tuple(sorted((*others, change), key=lambda each: each.first_step))


def experts_at(limits: RunLimits, changes: ExpertChanges, step: int) -> ExpertSet:
    """The experts that do a step, by what is decided."""
    return set_at(limits.num_experts, changes.decided, step)


def next_step_of_change(limits: RunLimits, changes: ExpertChanges, experts: ExpertSet, made: int) -> int | None:
    """The first step that other experts do than these; None if none is known.

    Args:
        made: the first step of the newest change of which they were made.
    """
    steps = [change.first_step for change in changes.decided]
    steps += [
        entry.at_step
        for entry in limits.expert_schedule
        if _changes(entry, experts) and not unfit_number(experts.num_experts, entry.num_experts, limits.top_k)
    ]
    return min((step for step in steps if step > made), default=None)


def is_decidable(limits: RunLimits, experts: ExpertSet, step: int, seen: Known) -> bool:
    """Whether what the schedule's change at a step depends on is known."""
    entry = _entry(limits, step)
    if entry is None or not is_measured(entry, experts.num_experts) or seen.watermark >= measured_step(step):
        return True
    return any(measured == measured_step(step) for measured, _ in seen.saliency)


def scheduled_change(limits: RunLimits, experts: ExpertSet, step: int, seen: Known) -> ExpertChange | None:
    """The change that the schedule has at a step; None if it has none there, or none that these experts can make."""
    entry = _entry(limits, step)
    if entry is None or not _changes(entry, experts):
        return None
    if unfit_number(experts.num_experts, entry.num_experts, limits.top_k):
        return None
    known = dict(seen.saliency).get(measured_step(step))
    return _change(limits, experts, entry, step, step, NOTHING if known is None else _scores(entry.keep, known))


def _entry(limits: RunLimits, step: int) -> ScheduledExperts | None:
    return next((entry for entry in limits.expert_schedule if entry.at_step == step), None)


def _scores(keep: str, saliency: Saliency) -> NDArray[np.float64]:
    """Scores by which experts stay: the mean norm of an expert's weighted outputs (arXiv:2510.13999), or its tokens."""
    norms_LE, tokens_LE = np.moveaxis(np.asarray(saliency, dtype=np.float64), -1, 0)
    if keep == "load":
        return np.asarray(tokens_LE)
    return np.asarray(np.divide(norms_LE, tokens_LE, out=np.zeros_like(norms_LE), where=tokens_LE > 0))


def requested_change(limits: RunLimits, experts: ExpertSet, request: ExpertRequest, seen: Known) -> ExpertChange:
    """The change that was asked for, whose step is not known yet."""
    change = _change(limits, experts, request, -1, -1 - request.number, scores_for(request.keep, seen))
    return replace(change, request=request.number)


def scores_for(keep: str, seen: Known) -> NDArray[np.float64]:
    """Scores by which experts of a request stay; empty if none are known."""
    if keep == "load":
        return seen.loads_LE
    return _scores("reap", seen.saliency[-1][1]) if keep == "reap" and seen.saliency else NOTHING


def _changes(entry: ScheduledExperts, experts: ExpertSet) -> bool:
    return entry.num_experts != experts.num_experts or (entry.dissolve and bool(experts.families))


def _change(
    limits: RunLimits,
    experts: ExpertSet,
    wanted: ScheduledExperts | ExpertRequest,
    step: int,
    draw: int,
    scores_LE: NDArray[np.float64],
) -> ExpertChange:
    """A change to what is wanted.

    Args:
        draw: distinguishes random choices of a run.
        scores_LE: those of experts that stay are highest; of other experts or empty: the first ones stay.
    """
    before, after = experts.num_experts, wanted.num_experts
    sources: OfLayers
    if after >= before:
        sources = cloned(before, after)
    else:
        num_layers = max(len(limits.moe_layers), 1)
        fits = scores_LE.ndim == 2 and scores_LE.shape[1] == before
        scores = scores_LE if fits else np.zeros((num_layers, before))
        if wanted.keep == "random":
            scores = np.random.default_rng([limits.seed, draw % (1 << 32)]).random((num_layers, before))
        sources = kept(_rows(scores), after)
    return ExpertChange(step, before, sources, wanted.dissolve, wanted.noise, wanted.reinit_ratio)


def _rows(scores_LE: NDArray[np.float64]) -> Sequence[Sequence[float]]:
    rows: list[list[float]] = scores_LE.tolist()
    return rows
