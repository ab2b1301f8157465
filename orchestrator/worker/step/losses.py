"""Losses and metrics of a step's micro-batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.errors import EntrypointError
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Loss
from orchestrator.worker.step.batches import StepMicroBatch


@dataclass(frozen=True)
class StepLosses:
    """Sums per micro-batch of a batch, 0 where the micro-batch is another rank's, and the units in all of them. Sums
    and counts stay on the device until the vote: the host doesn't wait for a micro-batch.

    Args:
        sums_SM: fp64; of the loss, then of each metric its sum and its weight.
        routed: counts of this rank's routers.
    """

    sums_SM: Tensor
    units: int
    routed: RoutingCounts

    @classmethod
    def zeros(
        cls, num_micro_batches: int, num_metrics: int, units: int, routed: RoutingCounts, device: torch.device
    ) -> "StepLosses":
        """Losses of no micro-batch yet."""
        shape = (num_micro_batches, 1 + 2 * num_metrics)
        return cls(torch.zeros(shape, dtype=torch.float64, device=device), units, routed)

    def enter(self, micro_batch: StepMicroBatch, loss: Loss) -> None:
        """Enter the loss of one of this rank's micro-batches.

        Raises:
            EntrypointError: the task counts other units than the data.
        """
        if loss.units is not None and loss.units != micro_batch.units:
            raise EntrypointError(
                f"the task's loss is a sum over {loss.units} units in a micro-batch in which the data have "
                f"{micro_batch.units}",
                remedy="Return as many units as the rows have, 1 each unless their column `units` has another number "
                "(docs/tasks.md).",
            )
        if micro_batch.number is not None:
            metrics = (each for pair in loss.metrics.values() for each in pair)
            for column, value in enumerate((loss.total, *metrics)):
                self.sums_SM[micro_batch.number, column] = value
