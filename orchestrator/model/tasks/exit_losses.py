"""Losses of early exits, learned beside that of the last layer (arXiv:2207.07061, section 3.4): the sum over exits of
their weight times the loss that the last layer has.

Shape legend: N = tokens, X = exits, S = sums of a loss.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.base import TrainableModel
from orchestrator.model.loss import IGNORED, CrossEntropy
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.spec.exits import ExitsSpec


class ExitLosses:
    """A task of next tokens for a model with exits (`orchestrator.model.task.Task`). The value of its loss is the last
    layer's, which can be compared with that of runs without exits; its gradients are of all.

    Args:
        task: whose rows and targets these are.
    """

    needs_reference = False

    def __init__(self, task: Task, exits: ExitsSpec) -> None:
        self._task, self._exits = task, exits
        self.metrics = names_of(exits)

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """As the task collates them."""
        return self._task.collate(rows, rng)

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the targets that count, in nats. Arguments as of `LanguageModeling.loss`."""
        scores = model.scores(batch["inputs"], batch.get("documents"), batch.get("lengths"))
        targets_N = scores.of_tokens(batch["targets"])
        total, sums_WS = scores.joint_loss(CrossEntropy(targets_N), self._exits.loss_weights)
        return Loss(total, metrics=metrics_of(self._exits, sums_WS[1:, 0], (targets_N != IGNORED).sum().float()))

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """The cross-entropy of each exit per target token."""
        return dict(means)


def names_of(exits: ExitsSpec | None) -> tuple[str, ...]:
    """Names of exits' metrics."""
    return () if exits is None else tuple(f"exit_{layer}_loss" for layer in exits.layers)


def metrics_of(exits: ExitsSpec | None, losses: Iterable[Tensor], weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Exits' metrics of a micro-batch, from their cross-entropies."""
    return {name: (loss, weight) for name, loss in zip(names_of(exits), losses, strict=True)}
