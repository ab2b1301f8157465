"""Direct preference optimization (arXiv:2305.18290): of two answers to a prompt, make the chosen one more likely than
the rejected one, measured against the model that training started from.

That model's log-probabilities are in the rows: they were computed once, from the starting weights.

Shape legend: B = pairs, T = tokens of the longest answer with its prompt.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss, Row
from orchestrator.model.tasks.chats import padded

CHOSEN, REJECTED = "chosen", "rejected"


class DirectPreference:
    """The loss of equation 7, conservative where labels are smoothed (`orchestrator.model.task.Task`).

    Args:
        beta: of the paper.
        label_smoothing: share of the pairs whose order is taken to be wrong.
    """

    metrics: tuple[str, ...] = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    needs_reference = True

    def __init__(self, beta: float, label_smoothing: float = 0.0) -> None:
        self._beta, self._smoothing = beta, label_smoothing

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """Chosen answers, then rejected ones: `inputs` (2B, T), `targets` (2B, T), `lengths` (2B,) and the starting
        model's log-probabilities `reference` (2B,)."""
        kinds = [(kind, row) for kind in (CHOSEN, REJECTED) for row in rows]
        arrays = padded([row[f"{kind}_inputs"] for kind, row in kinds], [row[f"{kind}_targets"] for kind, row in kinds])
        if f"reference_{CHOSEN}" in rows[0]:  # not where they are only now computed, or not needed
            arrays["reference"] = np.array([row[f"reference_{kind}"] for kind, row in kinds], np.float32)
        return arrays

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the pairs."""
        chosen_B, rejected_B = log_probabilities(model, batch).chunk(2)
        chosen_reference_B, rejected_reference_B = batch["reference"].chunk(2)
        chosen_B, rejected_B = chosen_B - chosen_reference_B, rejected_B - rejected_reference_B
        margin_B = self._beta * (chosen_B - rejected_B)
        loss_B = -F.logsigmoid(margin_B) * (1 - self._smoothing) - F.logsigmoid(-margin_B) * self._smoothing
        num_pairs = len(margin_B)
        weight = torch.full((), float(num_pairs), device=margin_B.device)
        sums = (
            (margin_B > 0).float().sum(),
            margin_B.sum(),
            self._beta * chosen_B.sum(),
            self._beta * rejected_B.sum(),
        )
        return Loss(
            loss_B.sum(), num_pairs, {name: (each, weight) for name, each in zip(self.metrics, sums, strict=True)}
        )

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """All means over the pairs."""
        return dict(means)


def log_probabilities(model: TrainableModel, batch: Batch) -> Tensor:
    """Log-probability (2B,) of each answer: the sum over its tokens."""
    return -model.token_losses(batch["inputs"], batch["targets"], batch["lengths"]).sum(-1)
