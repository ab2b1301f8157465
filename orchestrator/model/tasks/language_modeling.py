"""Language modeling: predict each row's next tokens. Which of them count is up to the token store, so this is the task
of supervised fine-tuning too.

Shape legend: B = rows, T = tokens in a row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Loss, Row


class LanguageModeling:
    """The cross-entropy of the target tokens (`orchestrator.model.task.Task`)."""

    metrics: tuple[str, ...] = ()
    needs_reference = False

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """Rows of one length as arrays (B, T). Token stores collate their rows themselves."""
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        """Sum over the targets that count, in nats.

        Args:
            batch: `inputs` (B, T), `targets` (B, T), and `documents` (B, T) and `lengths` (B,) where there are any; see
                `TrainableModel.forward`.
        """
        return Loss(model(batch["inputs"], batch["targets"], batch.get("documents"), batch.get("lengths")))

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}
