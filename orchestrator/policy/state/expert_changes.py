"""Changes of the number of experts that are decided, and the next one that is due. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, OfLayers, cloned, kept, set_at
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.progress import Progress
from orchestrator.protocol.messages import ExpertRequest
from orchestrator.protocol.step_record import Saliency
from orchestrator.spec.moe.experts import ScheduledExperts, is_measured, measured_step, unfit_number

NOTHING = np.zeros((0, 0))


@dataclass(frozen=True)
class ExpertChanges:
    """Decisions on the number of experts.

    Args:
        requests: number of requests that were applied.
        decided: in the order of their steps. A run that goes back behind one repeats it at the same step.
    """

    requests: int = 0
    decided: tuple[ExpertChange, ...] = ()

    def at(self, step: int) -> ExpertChange | None:
        """The decided change with which a step begins."""
        return next((change for change in self.decided if change.first_step == step), None)

    def with_new(self, change: ExpertChange) -> tuple[ExpertChange, ...]:
        """The decisions with another one, whose step is known."""
        others = (each for each in self.decided if each.first_step != change.first_step)
        return tuple(sorted((*others, change), key=lambda each: each.first_step))


def experts_at(limits: RunLimits, changes: ExpertChanges, step: int) -> ExpertSet:
    """The experts that do a step, by what is decided."""
    return set_at(limits.num_experts, changes.decided, step)


def next_step_of_change(limits: RunLimits, changes: ExpertChanges, experts: ExpertSet, after: int) -> int | None:
    """The first step later than `after` that other experts do than the step before; None if none is known.

    Args:
        experts: that do the steps before it.
    """
    steps = [change.first_step for change in changes.decided]
    steps += [entry.at_step for entry in limits.expert_schedule if _changes(entry, experts)]
    return min((step for step in steps if step > after), default=None)


def is_decidable(limits: RunLimits, experts: ExpertSet, step: int, progress: Progress) -> bool:
    """Whether what the schedule's change at a step depends on is known."""
    entry = _entry(limits, step)
    return entry is None or not is_measured(entry, experts.num_experts) or progress.watermark >= measured_step(step)


def scheduled_change(limits: RunLimits, experts: ExpertSet, step: int, progress: Progress) -> ExpertChange | None:
    """The change that the schedule has at a step; None if it has none there, or none that these experts can make."""
    entry = _entry(limits, step)
    if entry is None or not _changes(entry, experts):
        return None
    if unfit_number(experts.num_experts, entry.num_experts, limits.top_k):
        return None
    at = measured_step(step)
    known = [saliency for measured, saliency in progress.saliency if measured <= at]
    scores_LE = _scores(entry.keep, known[-1]) if known else NOTHING
    return _change(limits, experts, entry, step, step, scores_LE)


def _entry(limits: RunLimits, step: int) -> ScheduledExperts | None:
    return next((entry for entry in limits.expert_schedule if entry.at_step == step), None)


def _scores(keep: str, saliency: Saliency) -> NDArray[np.float64]:
    """Scores by which experts stay: the mean norm of an expert's weighted outputs (arXiv:2510.13999), or its tokens."""
    norms_LE, tokens_LE = np.moveaxis(np.asarray(saliency, dtype=np.float64), -1, 0)
    if keep == "load":
        return np.asarray(tokens_LE)
    return np.asarray(np.divide(norms_LE, tokens_LE, out=np.zeros_like(norms_LE), where=tokens_LE > 0))


def requested_change(limits: RunLimits, experts: ExpertSet, request: ExpertRequest, progress: Progress) -> ExpertChange:
    """The change that was asked for, whose step is not known yet."""
    scores_LE = progress.loads.mean_LE
    if request.keep == "reap":
        scores_LE = _scores("reap", progress.saliency[-1][1]) if progress.saliency else NOTHING
    return _change(limits, experts, request, -1, -1 - request.number, scores_LE)


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
        scores = scores_LE if scores_LE.ndim == 2 and scores_LE.shape[1] == before else np.zeros((1, before))
        if wanted.keep == "random":
            num_layers = max(len(limits.moe_layers), 1)
            scores = np.random.default_rng([limits.seed, draw % (1 << 32)]).random((num_layers, before))
        sources = kept(_rows(scores), experts, after, limits.top_k)
    return ExpertChange(step, before, sources, wanted.dissolve, wanted.noise, wanted.reinit_ratio)


def unchanged(experts: ExpertSet, step: int) -> ExpertChange:
    """A change that changes nothing."""
    return ExpertChange(step, experts.num_experts, cloned(experts.num_experts, experts.num_experts))


def _rows(scores_LE: NDArray[np.float64]) -> Sequence[Sequence[float]]:
    rows: list[list[float]] = scores_LE.tolist()
    return rows
