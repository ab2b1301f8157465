"""Placement of all layers' experts by the loads that a run had lately. Pure.

Shape legend: L = MoE layers, E = experts, W = ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.policy.health.expert_load import rank_violation
from orchestrator.policy.rescale.expert_packing import Ranks, pack
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.load_average import LoadAverage
from orchestrator.policy.state.run_state import Observation

LEAST_GAIN = 0.1  # of the busiest rank's load, by which a placement must lower it to replace another without a request
ALL = ""  # names the layers of a model that have one placement


def loads_of(average: LoadAverage, layers: Sequence[str], num_experts: int) -> Mapping[str, NDArray[np.float64]]:
    """Average tokens of each expert by layer; of a model whose layers have no names, the sum of all. Empty if unknown.

    Args:
        layers: names of those that may have placements of their own.
    """
    mean_LE = average.mean_LE
    if not mean_LE.size or mean_LE.shape[1] != num_experts:
        return {}
    return dict(zip(layers, mean_LE, strict=True)) if len(layers) == len(mean_LE) else {ALL: mean_LE.sum(0)}


def placed_by_load(limits: RunLimits, seen: Observation, was: ExpertPlacement, nodes: Sequence[str]) -> ExpertPlacement:
    """The placement with the lowest peak load that is found from this one, by layer if layers may differ."""
    loads = loads_of(seen.progress.loads, limits.moe_layers, was.num_experts)
    if not loads or was.world_size == 1:
        return was
    return _placed(seen.progress.loads, limits.moe_layers, was, tuple(nodes), limits.placement.num_redundant_experts)


@lru_cache(maxsize=2)  # a decision that is put off asks again at each turn, with the same loads
def _placed(
    average: LoadAverage, layers: tuple[str, ...], was: ExpertPlacement, nodes: tuple[str, ...], copies: int
) -> ExpertPlacement:
    redundant = max(copies, was.world_size - was.num_experts)
    ranks = Ranks.of(was.world_size, was.num_experts, redundant, nodes)
    loads = loads_of(average, layers, was.num_experts)
    found = {layer: pack(load_E, was.holders_of(layer), ranks, redundant) for layer, load_E in loads.items()}
    if all(holders == was.holders_of(layer) for layer, holders in found.items()):
        return was
    if ALL in found:
        return replace(was, holders=found[ALL])
    return replace(was, layers=tuple(found.items()))


def better_placed(limits: RunLimits, seen: Observation, was: ExpertPlacement, nodes: Sequence[str]) -> ExpertPlacement:
    """The placement by load, if loads are known and it lowers the busiest rank's by `LEAST_GAIN`; else this one."""
    if not seen.progress.loads.is_known:
        return was
    placement = placed_by_load(limits, seen, was, nodes)
    before, after = (violation_of(limits, seen, each, nodes) for each in (was, placement))
    return placement if lighter(before, after) >= LEAST_GAIN else was


def lighter(before: float, after: float) -> float:
    """The share of the busiest rank's load that it no longer has, by the `rank_violation` before and after."""
    return 1 - (1 + after) / (1 + before)


def violation_of(limits: RunLimits, seen: Observation, placement: ExpertPlacement, nodes: Sequence[str]) -> float:
    """The `rank_violation` that a placement has with these loads."""
    return _violation(seen.progress.loads, limits.moe_layers, placement, tuple(nodes))


@lru_cache(maxsize=4)
def _violation(
    average: LoadAverage, layers: tuple[str, ...], placement: ExpertPlacement, nodes: tuple[str, ...]
) -> float:
    mean_LE = average.mean_LE
    if not mean_LE.size or mean_LE.shape[1] != placement.num_experts:
        return 0.0
    names = layers if len(layers) == len(mean_LE) else (ALL,) * len(mean_LE)
    return rank_violation(mean_LE, np.array([placement.shares(nodes, layer) for layer in names]))


def num_moved(limits: RunLimits, seen: Observation, was: ExpertPlacement, placement: ExpertPlacement) -> int:
    """Experts that ranks get which they didn't have, over all layers."""
    layers = limits.moe_layers or (ALL,) * len(seen.progress.loads.mean_LE)
    pairs = (zip(was.holders_of(layer), placement.holders_of(layer), strict=True) for layer in layers)
    return sum(len({*new} - {*old}) for layer in pairs for old, new in layer)
