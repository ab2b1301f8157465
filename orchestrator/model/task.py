"""The interface of a task: the loss of a micro-batch, as a sum over units that the row source has counted.

A task is a pure function of a micro-batch: it keeps nothing from one to the next, and draws random numbers from torch's
own generator alone, which is seeded for each micro-batch. So it doesn't matter which rank runs it.

Shape legend: B = rows, whatever they are made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.base import TrainableModel

Row = Mapping[str, NDArray[np.generic]]  # one row of a row source: arrays by name
Batch = Mapping[str, Tensor]  # a micro-batch: tensors by name, whose first axis is the rows (B, ...); B may be 0


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Args:
        total: scalar, fp32: a sum over the micro-batch's units (target tokens, images, pairs), never a mean.
        units: how many they are. None: target tokens, which the token store has counted.
        metrics: scalars by name, each a sum and the weight by which its mean is made.
    """

    total: Tensor
    units: int | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=lambda: MappingProxyType({}))

    def detached(self) -> "Loss":
        """The same without its graph."""
        metrics = {name: (each.detach(), weight.detach()) for name, (each, weight) in self.metrics.items()}
        return Loss(self.total.detach(), self.units, metrics)


class Task(Protocol):
    """What a run learns.

    Attributes:
        metrics: names of the metrics of every loss, in order; a rank without rows votes on them too.
        needs_reference: whether pairs are to have the log-probabilities of the model that training starts from.
    """

    @property
    def metrics(self) -> tuple[str, ...]: ...

    @property
    def needs_reference(self) -> bool: ...

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """The arrays of a micro-batch. The first axis of each is the rows, as many times as a row has parts.

        Args:
            rows: at least one.
            rng: seeded by the run's seed, the step and the number of the micro-batch.
        """
        ...

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """The loss of a micro-batch, which may have no rows. It calls the model equally often for any micro-batch, as
        all ranks do so together."""
        ...

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """What a step's record shows of the metrics: their means over the global batch, or others made of them."""
        ...
