"""Experts' loads, step after step: their records, and the routers' biases that follow from them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.engine.optim.lr_schedule import decay
from orchestrator.model.moe.routing.balance import RoutingCounts, next_bias
from orchestrator.model.moe.routed_experts import RoutedExperts
from orchestrator.policy.health.expert_load import expert_load, is_shown
from orchestrator.protocol.step_record import RoutingRecord
from orchestrator.spec.job import JobSpec


class RoutingRecorder:
    """Compares each step's loads with those of the step before.

    Args:
        num_steps: of the run.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._newest: tuple[int, int, NDArray[np.int64]] | None = None  # generation, step, and its counts

    def record(self, generation: int, step: int, counts_LE: Tensor) -> RoutingRecord:
        """The record of a step. Steps are compared within a generation."""
        newest = self._newest
        before = newest[2] if newest is not None and newest[:2] == (generation, step - 1) else None
        counts = counts_LE.numpy()
        self._newest = (generation, step, counts)
        loads = tuple(map(tuple, counts.tolist())) if is_shown(step, self._num_steps) else ()
        return RoutingRecord(expert_load(counts, before), loads)


def move_biases(spec: JobSpec, layers: Sequence[RoutedExperts], routed: RoutingCounts, step: int) -> None:
    """Move the routers' biases, if they have some, by the expert counts of a step's global batch."""
    biases = [bias_E for layer in layers if (bias_E := layer.correction_bias_E) is not None]
    if not spec.model.bias_update_speed or len(biases) < max(1, len(layers)):
        return
    bias_LE = torch.stack(biases)
    # On the host, so that unlike GPUs compute the same. It waits for a GPU as often for many layers as for one.
    moved_LE = next_bias(bias_LE.cpu(), routed, spec.model, decay(spec.train, step))
    bias_LE = moved_LE.to(bias_LE.device)
    for held_E, bias_E in zip(biases, bias_LE, strict=True):
        held_E.copy_(bias_E)
