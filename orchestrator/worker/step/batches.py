"""Rows of a step: from the sample order to this rank's micro-batches as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.manifest import Split
from orchestrator.data.sample_order import Orders
from orchestrator.data.store import TokenStore
from orchestrator.model.base import MicroBatch
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.micro_batches import (
    MicroBatchSize,
    max_micro_batches,
    micro_batches_of,
    padded_tokens,
    split_into_micro_batches,
)
from orchestrator.sampling.sample_order import Order, RowSpans
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec


@dataclass(frozen=True)
class StepMicroBatch:
    """A micro-batch and its number in the global batch; None for an empty pass that keeps ranks in step."""

    number: int | None
    batch: MicroBatch


@dataclass(frozen=True)
class StepBatches:
    """One rank's work in a step.

    Args:
        micro_batches: as many on every rank; a rank without a micro-batch left has a batch of no rows.
        num_micro_batches: micro-batches of the whole global batch.
        global_tokens: targets in the whole global batch.
        first_position, num_positions: the sample positions that the step consumes.
        stage: of the curriculum; empty without one.
        sequence_length: tokens of a row, or of the longest possible row.
        tokens: [num_micro_batches], of each micro-batch.
        padded_tokens: [num_micro_batches], padding included.
    """

    micro_batches: tuple[StepMicroBatch, ...]
    num_micro_batches: int
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


class BatchReader:
    """Reads steps from the packed store.

    Args:
        job: batch sizes, row length, document isolation.
        store: the prepared corpus.
    """

    def __init__(self, job: JobSpec, store: TokenStore, device: torch.device) -> None:
        train = job.train
        self._job, self._store, self._device = job, store, device
        self._orders = Orders(job, store)
        self.order = self._orders.first
        self._length = train.sequence_length
        self._validation = self._validation_rows()

    def _validation_rows(self) -> RowSpans:
        """The first documents, or the first rows, of the split."""
        most = self._job.eval.rows
        if self._job.data.row_format == BY_DOCUMENT:
            lengths_D = self._store.index("validation")["length"][:most].astype(np.int64)
            chunks = Chunks.of(lengths_D, np.zeros(len(lengths_D)), self._length)
            return RowSpans(Spans(chunks.start[:most], chunks.length[:most]), self._length, by_document=True)
        rows = np.arange(min(most, self._store.num_rows("validation", self._length)), dtype=np.int64)
        return RowSpans(self._store.spans("validation", rows, self._length), self._length)

    @property
    def first_order(self) -> str:
        """The sample order at the start of a run, in its saved form."""
        return self._orders.first.to_json()

    def follow(self, saved: str) -> None:
        """Switch to a saved sample order. Raises ProtocolError if it is invalid."""
        if saved != self.order.to_json():
            self.order = self._orders.saved(saved)

    def decide(self, stages: Sequence[StageStart], first_step: int) -> None:
        """Follow decided stages from `first_step` on. Raises ValueError, DataError if they can't be followed."""
        self.order = self._orders.decided(self.order, stages, first_step)

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        """This rank's part of a training step, in micro-batches of this size."""
        wanted = self.order.at(step)
        lengths_R = wanted.rows.lengths_R
        cut = split_into_micro_batches(lengths_R, size)
        return StepBatches(
            micro_batches=self._micro_batches("train", wanted.rows, cut, rank, world_size),
            num_micro_batches=len(cut),
            global_tokens=self._store.target_count("train", wanted.rows.spans),
            first_position=wanted.first_position,
            num_positions=wanted.num_positions,
            stage=wanted.stage if self._job.curriculum else "",
            sequence_length=wanted.rows.sequence_length,
            tokens=tuple(int(lengths_R[rows].sum()) for rows in cut),
            padded_tokens=tuple(padded_tokens(lengths_R, cut).tolist()),
        )

    def spans(self, order: Order, step: int, rank: int, world_size: int, size: MicroBatchSize) -> Spans:
        """The tokens of this rank's part of a training step."""
        rows = order.at(step).rows
        cut = split_into_micro_batches(rows.lengths_R, size)
        mine = [rows.take(cut[n]).spans for n in micro_batches_of(rank, world_size, len(cut))]
        return Spans.joined([rows.take(np.empty(0, np.int64)).spans, *mine])

    def fetch(self, spans: Spans) -> bool:
        """Fetch training tokens that will be read, as `TokenStore.fetch`."""
        return self._store.fetch("train", spans)

    @property
    def is_local(self) -> bool:
        """Whether all rows are on this node, so that none need to be fetched."""
        return self._store.is_local

    def validation(self, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        """This rank's part of a validation: always the same rows."""
        rows = self._validation
        cut = split_into_micro_batches(rows.lengths_R, size)
        return StepBatches(
            micro_batches=self._micro_batches("validation", rows, cut, rank, world_size),
            num_micro_batches=len(cut),
            global_tokens=self._store.target_count("validation", rows.spans),
            first_position=0,
            num_positions=0,
        )

    def _micro_batches(
        self, split: Split, rows: RowSpans, cut: Sequence[NDArray[np.int64]], rank: int, world_size: int
    ) -> tuple[StepMicroBatch, ...]:
        micro_batches = [
            StepMicroBatch(n, self._read(split, rows.take(cut[n])))
            for n in micro_batches_of(rank, world_size, len(cut))
        ]
        nothing = np.empty(0, np.int64)
        while len(micro_batches) < max_micro_batches(world_size, len(cut)):
            micro_batches.append(StepMicroBatch(None, self._read(split, rows.take(nothing))))
        return tuple(micro_batches)

    def _read(self, split: Split, rows: RowSpans) -> MicroBatch:
        if rows.by_document:
            read = self._store.read_padded(split, rows.spans)
        else:
            read = self._store.read(split, rows.spans, rows.sequence_length)
        isolated = self._job.data.isolate_documents
        return MicroBatch(
            inputs_BT=self._on_device(read.inputs_RT),
            targets_BT=self._on_device(read.targets_RT),
            documents_BT=self._on_device(read.documents_RT) if isolated else None,
            lengths_B=None if read.lengths_R is None else self._on_device(read.lengths_R),
        )

    def _on_device(self, array: NDArray[np.integer]) -> Tensor:
        on_host = torch.from_numpy(array)
        if self._device.type == "cpu":
            return on_host
        return on_host.pin_memory().to(self._device, non_blocking=True)
