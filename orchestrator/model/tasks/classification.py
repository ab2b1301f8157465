"""Classification of rows of arrays by a user's model, which maps them to a logit per class.

Shape legend: B = rows, C = classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.errors import EntrypointError
from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss, Row


class Classification:
    """Cross-entropy of the classes (`orchestrator.model.task.Task`).

    Args:
        inputs, labels: columns of the rows: what the model gets, and the class.
    """

    metrics: tuple[str, ...] = ("accuracy",)
    needs_reference = False

    def __init__(self, inputs: str, labels: str) -> None:
        self._inputs, self._labels = inputs, labels

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """The rows' `inputs` (B, ...), which must be of one shape, and `labels` (B,), int64."""
        inputs = np.stack([row[self._inputs] for row in rows])
        if inputs.dtype == np.float64:  # what lists of numbers are read as
            inputs = inputs.astype(np.float32)
        return {"inputs": inputs, "labels": np.array([row[self._labels] for row in rows], np.int64)}

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the rows, in nats.

        Raises:
            EntrypointError: the model doesn't return logits (B, C).
        """
        inputs, labels_B = batch["inputs"], batch["labels"]
        if inputs.is_floating_point():
            inputs = inputs.to(next(model.parameters()).dtype)
        logits_BC = model.outputs(inputs)
        if not isinstance(logits_BC, Tensor) or logits_BC.ndim != 2 or len(logits_BC) != len(labels_B):
            shape = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
            raise EntrypointError(
                f"the forward of {model.spec.origin} returned {shape} for {len(labels_B)} rows",
                remedy="It must return logits (rows, classes).",
            )
        total = F.cross_entropy(logits_BC.float(), labels_B, reduction="sum")
        right = (logits_BC.argmax(-1) == labels_B).float().sum()
        return Loss(total, len(labels_B), {"accuracy": (right, torch.full_like(right, float(len(labels_B))))})

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """The share of rows whose class has the largest logit."""
        return dict(means)
