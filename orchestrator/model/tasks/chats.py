"""Supervised fine-tuning on chats: language modeling of the tokens that the assistant says, a chat per row.

Shape legend: B = chats, T = tokens of the longest.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.model.loss import IGNORED
from orchestrator.model.task import Row
from orchestrator.model.tasks.language_modeling import LanguageModeling


class ChatModeling(LanguageModeling):
    """The cross-entropy of what the assistant says; which tokens these are, the rows show by their targets."""

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        """`inputs` (B, T), `targets` (B, T) and `lengths` (B,)."""
        return padded([row["inputs"] for row in rows], [row["targets"] for row in rows])


def padded(
    inputs: Sequence[NDArray[np.generic]], targets: Sequence[NDArray[np.generic]]
) -> dict[str, NDArray[np.generic]]:
    """Rows of tokens, padded to the longest: `inputs`, `targets` and `lengths`, int64."""
    lengths_B = np.array([len(row) for row in inputs], np.int64)
    real_BT = np.arange(int(lengths_B.max(initial=1))) < lengths_B[:, None]
    inputs_BT, targets_BT = np.zeros(real_BT.shape, np.int64), np.full(real_BT.shape, IGNORED, np.int64)
    inputs_BT[real_BT], targets_BT[real_BT] = np.concatenate(inputs), np.concatenate(targets)
    return {"inputs": inputs_BT, "targets": targets_BT, "lengths": lengths_B}
