"""Experts' loads, step after step: their records, and the state of routers that follows from them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.engine.optim.lr_schedule import decay
from orchestrator.model.base import TrainableModel
from orchestrator.model.moe.routing.balance import RoutingCounts, next_bias, next_mass
from orchestrator.model.moe.routing.router import Router
from orchestrator.model.moe.routing.saliency import next_saliency
from orchestrator.policy.health.expert_load import expert_load, rank_violation
from orchestrator.protocol.step_record import RoutingRecord, Saliency
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec

RECORDED_EVERY = 64  # steps between records with averages for requests; they may be large


class RoutingRecorder:
    """Compares each step's loads with those of the step before."""

    def __init__(self, model: ModelSpec) -> None:
        self._model = model
        self._newest: tuple[int, int, NDArray[np.int64]] | None = None  # generation, step, and its counts

    def record(
        self, generation: int, step: int, routed: RoutingCounts, shares_LEW: NDArray[np.float64]
    ) -> RoutingRecord:
        """The record of a step, of whose global batch these are the counts. Steps are compared within a generation.

        Args:
            shares_LEW: of an expert's tokens that each rank computes.
        """
        newest = self._newest
        before = newest[2] if newest is not None and newest[:2] == (generation, step - 1) else None
        counts = routed.counts_LE.numpy()
        self._newest = (generation, step, counts)
        loads = tuple(map(tuple, counts.tolist())) if counts.any() else ()
        load = expert_load(counts, before)
        if shares_LEW.shape[-1] > 1 and loads:
            load = replace(load, rank_violation=rank_violation(counts, shares_LEW))
        num_choices = max(int(counts.sum()), 1)
        if self._model.router.capacity_factor is not None:
            load = replace(load, dropped=int(routed.dropped_L.sum()) / num_choices)
        if num_masses := int(routed.masses_LM.sum()):
            load = replace(load, per_token=num_choices / num_masses * (self._model.max_experts_per_tok - 1))
        return RoutingRecord(load, loads)


def saliency_at(spec: JobSpec, model: TrainableModel, step: int) -> Saliency:
    """The averages of what experts add, at steps whose record has them."""
    is_recorded = step in spec.measured_steps or (spec.experts.saliency and step % RECORDED_EVERY == 0)
    if not is_recorded:
        return ()
    kept = [layer.router.saliency_E2 for layer in model.moe_layers if isinstance(layer.router, Router)]
    by_layer = torch.stack(kept).cpu().tolist() if kept else []
    return tuple(tuple((norms, tokens) for norms, tokens in of_experts) for of_experts in by_layer)


def move_router_state(spec: JobSpec, model: TrainableModel, routed: RoutingCounts, step: int) -> None:
    """Move the routers' biases and thresholds, if they have some, by the counts of a step's global batch."""
    layers = model.moe_layers
    kept = [layer.router.saliency_E2 for layer in layers if layer.keeps_saliency and isinstance(layer.router, Router)]
    if kept:
        _move(kept, partial(next_saliency, routed=routed))
    biases = [bias_E for layer in layers if (bias_E := layer.correction_bias_E) is not None]
    if spec.model.bias_update_speed and biases and len(biases) == len(layers):
        _move(biases, partial(next_bias, routed=routed, spec=model.spec, decay=decay(spec.train, step)))
    offsets = [offset_1 for layer in layers if (offset_1 := layer.mass_offset_1) is not None]
    if offsets and len(offsets) == len(layers):
        _move(offsets, partial(next_mass, routed=routed, spec=model.spec, decay=decay(spec.train, step)))


def _move(held: Sequence[Tensor], moved: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor of each layer's by what follows from those of all layers.

    On the host, so that unlike GPUs compute the same. It waits for a GPU as often for many layers as for one.
    """
    held_LX = torch.stack([*held])
    moved_LX = moved(held_LX.cpu()).to(held_LX.device)
    for mine_X, next_X in zip(held, moved_LX, strict=True):
        mine_X.copy_(next_X)
