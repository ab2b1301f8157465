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


def violation_of(limits: RunLimits, seen: Observation, placement: ExpertPlacement, nodes: Sequence[str]) -> float:
    """The `rank_violation` that a placement has with these loads."""
    loads = loads_of(seen.progress.loads, limits.moe_layers, placement.num_experts)
    if not loads:
        return 0.0
    shares_LEW = np.array([placement.shares(nodes, layer) for layer in loads])
    return rank_violation(np.stack([*loads.values()]), shares_LEW)


def num_moved(limits: RunLimits, was: ExpertPlacement, placement: ExpertPlacement) -> int:
    """Experts that a rank gets which it didn't have, over all layers."""
    pairs = (
        zip(was.holders_of(layer), placement.holders_of(layer), strict=True) for layer in limits.moe_layers or (ALL,)
    )
    return sum(len({*new} - {*old}) for layer in pairs for old, new in layer)
