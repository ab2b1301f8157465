"""Micro-batches of a dry run: rows of the data, or of drawn tokens.

Shape legend: B = rows, T = tokens in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.loss import IGNORED
from orchestrator.model.task import Batch, Row, Task
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import ARRAYS, MESSAGES, PREFERENCE, UNITS


@dataclass(frozen=True)
class Samples:
    """Micro-batches of a dry run."""

    job: JobSpec
    task: Task
    device: torch.device
    rows: Sequence[Row]
    vocab_size: int

    @property
    def last(self) -> int:
        """Number of another row than 0, if there is one."""
        return 0 if len(self.rows) == 1 else 1

    def of(self, *numbers: int) -> tuple[Batch, int]:
        """The rows with these numbers, and how many units the data count in them."""
        if self.rows:
            some = [self.rows[number] for number in numbers] or list(self.rows[:1])
            arrays = self.task.collate(some, np.random.default_rng(0))
            tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            kept = {name: tensor if numbers else tensor[:0] for name, tensor in tensors.items()}
            units = sum(self._units(self.rows[number]) for number in numbers)
            return {name: tensor.to(self.device) for name, tensor in kept.items()}, units
        shape = (len(numbers), self.job.train.sequence_length)
        drawn = [_drawn(self.vocab_size, shape[1], number) for number in numbers]
        tokens_BT = torch.from_numpy(np.array(drawn, dtype=np.int64).reshape(shape)).to(self.device)
        batch: dict[str, Tensor] = {"inputs": tokens_BT, "targets": tokens_BT.roll(-1, 1)}
        if self.job.data.isolate_documents:
            batch["documents"] = torch.zeros_like(tokens_BT)
        return batch, tokens_BT.numel()

    def _units(self, row: Row) -> int:
        """What the store of rows counts in one."""
        if self.job.data_format == MESSAGES:
            return int((row["targets"] != IGNORED).sum())
        return int(row.get(UNITS, 1)) if self.job.data_format == ARRAYS and self.job.task.entrypoint else 1


def drawn_chats(job: JobSpec, vocab_size: int, has_reference: bool) -> list[Row]:
    """Two rows of drawn tokens, as the store has those of chats, or of pairs of them."""
    rows: list[Row] = []
    for number in range(2):
        row: dict[str, NDArray[np.generic]] = {}
        for part, kind in enumerate(("chosen_", "rejected_") if job.data_format == PREFERENCE else ("",)):
            tokens_T = _drawn(vocab_size, job.train.sequence_length, (part, number))
            row |= {f"{kind}inputs": tokens_T, f"{kind}targets": np.roll(tokens_T, -1)}
        reference = {f"reference_{kind}": np.zeros(()) for kind in ("chosen", "rejected")}
        rows.append(row | reference if has_reference and job.data_format == PREFERENCE else row)
    return rows


def _drawn(vocab_size: int, length: int, seed: int | tuple[int, int]) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(vocab_size, size=length)
