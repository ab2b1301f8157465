"""Balance of a step's tokens over experts. Pure.

Shape legend: L = MoE layers, E = experts, S = steps.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.protocol.expert_load import ExpertLoad, Loads
from orchestrator.protocol.step_record import StepRecord

# Edges of the bins by which routers count margins (orchestrator.model.moe.routing.balance): 0, and magnitudes of
# half-octaves from 2^-11 to 1, which is as far as sigmoid scores lie apart.
_MAGNITUDES = tuple(2.0 ** (power / 2) for power in range(-22, 1))
MARGIN_EDGES = (*(-magnitude for magnitude in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES)
NUM_MARGIN_BINS = len(MARGIN_EDGES) + 1

SHOWN_STEPS = 200  # columns of the heat map of a whole run
LARGE_SWING = 0.25  # of the mean load, below which loads that change sides are noise


@dataclass(frozen=True)
class LoadMap:
    """The loads of a run's experts over its steps.

    Args:
        steps: of the columns, ascending.
        load_LES: by MoE layer, expert and column, load / mean load; NaN where a layer had no tokens, or fewer experts.
        moves: steps from which on experts were placed by their loads.
    """

    steps: tuple[int, ...]
    load_LES: NDArray[np.float64]
    moves: tuple[int, ...] = ()


def expert_load(counts_LE: NDArray[np.int64], before_LE: NDArray[np.int64] | None = None) -> ExpertLoad:
    """Summary of the experts' loads in a step.

    Args:
        counts_LE: tokens routed to each expert over the global batch of a step.
        before_LE: the same of the step before; None if unknown.
    """
    (layers,) = np.nonzero(counts_LE.any(-1))
    if not len(layers):  # no experts, or nothing routed
        return ExpertLoad()
    load_LE = counts_LE[layers] / counts_LE[layers].mean(-1, keepdims=True)  # 1: as large as the mean
    violation_L = load_LE.max(-1) - 1.0
    share_LE = load_LE / load_LE.sum(-1, keepdims=True)
    entropy_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1.0))).sum(-1)
    num_experts = load_LE.shape[1]
    return ExpertLoad(
        max_violation=float(violation_L.mean()),
        worst_violation=float(violation_L.max()),
        worst_layer=int(layers[violation_L.argmax()]),
        num_experts=num_experts,
        utilisation=float((1.0 / (violation_L + 1.0)).mean()),
        dead=float((load_LE == 0).mean()),
        entropy=float(entropy_L.mean() / math.log(num_experts)) if num_experts > 1 else 1.0,
        swing=None if before_LE is None else _swing(load_LE, before_LE[layers]),
    )


def rank_violation(load_LE: NDArray[np.float64], shares_LEW: NDArray[np.float64]) -> float:
    """Largest load of a rank over the mean, minus 1, over all layers: their largest loads are summed, as a layer begins
    when the one before has ended. 0 without tokens.

    Args:
        load_LE: tokens of each expert.
        shares_LEW: of an expert's tokens that each rank computes.
    """
    load_LW = np.einsum("le,lew->lw", load_LE, shares_LEW)
    mean = load_LW.mean(-1).sum()
    return float(load_LW.max(-1).sum() / mean) - 1.0 if mean else 0.0


def _swing(load_LE: NDArray[np.float64], before_LE: NDArray[np.int64]) -> float:
    """The share of experts whose load lies well above the mean in one of two steps and well below it in the other."""
    if not before_LE.any(-1).all():
        return 0.0
    now_LE, then_LE = load_LE - 1.0, before_LE / before_LE.mean(-1, keepdims=True) - 1.0
    is_large_LE = np.minimum(abs(now_LE), abs(then_LE)) > LARGE_SWING
    return float(((now_LE * then_LE < 0) & is_large_LE).mean())


def is_shown(step: int, num_steps: int) -> bool:
    """Whether a step's record holds its loads: those of about `SHOWN_STEPS` steps do, evenly spaced."""
    return step % max(num_steps // SHOWN_STEPS, 1) == 0 or step == num_steps - 1


def largest_violation(num_experts: int, top_k: int) -> float:
    """MaxVio where all tokens choose the same `top_k` experts; 0 where they have no choice."""
    return num_experts / top_k - 1.0


def shown_loads(records: Iterable[StepRecord]) -> dict[int, Loads]:
    """The loads in records, by step."""
    return {record.step: record.routing.loads for record in records if record.routing.loads}


def load_map(loads: Mapping[int, Loads], moves: Iterable[int] = ()) -> LoadMap | None:
    """Heat map of the loads of these steps; None where no token was routed in any of them.

    Args:
        moves: steps from which on experts were placed by their loads.
    """
    if not any(any(tokens_E) for tokens_LE in loads.values() for tokens_E in tokens_LE):
        return None
    steps = tuple(sorted(loads))
    by_step = [np.asarray(loads[step], dtype=np.float64) for step in steps]
    counts_LES = np.full((len(by_step[0]), max(count_LE.shape[1] for count_LE in by_step), len(steps)), np.nan)
    for number, count_LE in enumerate(by_step):
        counts_LES[:, : count_LE.shape[1], number] = count_LE
    mean_L1S = np.nanmean(counts_LES, 1, keepdims=True)
    return LoadMap(
        steps, np.divide(counts_LES, mean_L1S, out=np.full_like(counts_LES, np.nan), where=mean_L1S > 0), tuple(moves)
    )
