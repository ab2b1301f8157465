"""Rows of a step: from the sample order to this rank's micro-batches as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.model.task import Batch, Row
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Ints, Spans
from orchestrator.sampling.micro_batches import MicroBatchSize, max_micro_batches, micro_batches_of
from orchestrator.sampling.sample_order import Order


@dataclass(frozen=True)
class StepMicroBatch:
    """A micro-batch and its number in the global batch; None for an empty pass that keeps ranks in step.

    Args:
        units: in it, as the data count them.
        scale: units to which auxiliary losses, sums over tokens, are scaled; None: the tokens themselves.
    """

    number: int | None
    batch: Batch
    units: int = 0
    scale: int | None = None


@dataclass(frozen=True)
class StepBatches:
    """One rank's work in a step.

    Args:
        micro_batches: as many on every rank; a rank without a micro-batch left has a batch of no rows.
        num_micro_batches: micro-batches of the whole global batch.
        global_units: units in the whole global batch: target tokens, or what else a loss is a mean over.
        global_tokens: tokens in it: of text the targets, of chats all, of rows that have none the rows.
        first_position, num_positions: the sample positions that the step consumes.
        stage: of the curriculum; empty without one.
        sequence_length: tokens of a row, or of the longest possible row.
        tokens: [num_micro_batches], of each micro-batch.
        padded_tokens: [num_micro_batches], padding included.
    """

    micro_batches: tuple[StepMicroBatch, ...]
    num_micro_batches: int
    global_units: int
    global_tokens: int
    first_position: int
    num_positions: int
    stage: str = ""
    sequence_length: int = 0
    tokens: tuple[int, ...] = ()
    padded_tokens: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """This rank's part of the global batch, in micro-batches of average size."""
        mine = [micro_batch.number for micro_batch in self.micro_batches if micro_batch.number is not None]
        return sum(self.tokens[number] for number in mine) * self.num_micro_batches / max(sum(self.tokens), 1)

    @property
    def padding(self) -> float:
        """The share of the micro-batches' tokens that is padding."""
        return 1 - sum(self.tokens) / max(sum(self.padded_tokens), 1)


class BatchReader(Protocol):
    """Reads the steps of a run.

    Attributes:
        order: of the samples.
    """

    order: Order

    @property
    def first_order(self) -> str:
        """The sample order at the start of a run, in its saved form."""
        ...

    def follow(self, saved: str) -> None:
        """Switch to a saved sample order. Raises ProtocolError if it is invalid."""
        ...

    def decide(self, stages: Sequence[StageStart], first_step: int) -> None:
        """Follow decided stages from `first_step` on. Raises ValueError, DataError if they can't be followed."""
        ...

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        """This rank's part of a training step, in micro-batches of this size."""
        ...

    def validation(self, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        """This rank's part of a validation: always the same rows."""
        ...

    def rows_to_try(self) -> Sequence[Row]:
        """Two rows for a dry run, of different shapes if there are any; none of text."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether all rows are on this node, so that none need to be fetched."""
        ...

    def spans(self, order: Order, step: int, rank: int, world_size: int, size: MicroBatchSize) -> Spans:
        """What this rank's part of a training step will read, for `fetch`."""
        ...

    def fetch(self, spans: Spans) -> bool:
        """Fetch what will be read to this node. Returns whether everything was there already."""
        ...


def rank_micro_batches(
    cut: Sequence[Ints], rank: int, world_size: int, read: Callable[[Ints, int], StepMicroBatch]
) -> tuple[StepMicroBatch, ...]:
    """This rank's micro-batches, and passes on no rows to make them as many as those of other ranks.

    Args:
        cut: row indices of each micro-batch of the global batch.
        read: gives the micro-batch of these rows, and of a number.
    """
    mine = [read(cut[number], number) for number in micro_batches_of(rank, world_size, len(cut))]
    for _ in range(max_micro_batches(world_size, len(cut)) - len(mine)):
        mine.append(StepMicroBatch(None, read(np.empty(0, np.int64), 0).batch))
    return tuple(mine)


def on_device(arrays: Mapping[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
    """Arrays as tensors; the host doesn't wait for copies to a GPU."""
    on_host = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if device.type == "cpu":
        return on_host
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in on_host.items()}
