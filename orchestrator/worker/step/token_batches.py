"""Steps of a text: rows of its tokens, packed or a document each."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.logit_store import LogitStore
from orchestrator.data.manifest import Split
from orchestrator.data.sample_order import Orders
from orchestrator.data.store import IGNORED_TARGET, TokenStore
from orchestrator.model.task import Row
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.micro_batches import (
    MicroBatchSize,
    micro_batches_of,
    padded_tokens,
    split_into_micro_batches,
)
from orchestrator.sampling.sample_order import Order, RowSpans
from orchestrator.spec.data import BY_DOCUMENT
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.batches import StepBatches, StepMicroBatch, on_device, rank_micro_batches


class TokenBatches:
    """Reads steps from the packed store (`orchestrator.worker.step.batches.BatchReader`).

    Args:
        job: batch sizes, row length, document isolation.
        store: the prepared corpus.
        logits: what a teacher predicts for its rows; None without one, or if workers have the teacher.
    """

    def __init__(self, job: JobSpec, store: TokenStore, device: torch.device, logits: LogitStore | None = None) -> None:
        train = job.train
        self._job, self._store, self._device, self._logits = job, store, device, logits
        self._orders = Orders(job, store)
        self.order: Order = self._orders.first
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
        return self._orders.first.to_json()

    def follow(self, saved: str) -> None:
        if saved != self.order.to_json():
            self.order = self._orders.saved(saved)

    def decide(self, stages: Sequence[StageStart], first_step: int) -> None:
        self.order = self._orders.decided(self.order, stages, first_step)

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        wanted = self.order.at(step)
        lengths_R = wanted.rows.lengths_R
        cut = split_into_micro_batches(lengths_R, size)
        return StepBatches(
            micro_batches=self._micro_batches("train", wanted.rows, cut, rank, world_size),
            num_micro_batches=len(cut),
            global_units=(num_targets := self._store.target_count("train", wanted.rows.spans)),
            global_tokens=num_targets,
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
        return self._store.is_local

    def validation(self, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        rows = self._validation
        cut = split_into_micro_batches(rows.lengths_R, size)
        return StepBatches(
            micro_batches=self._micro_batches("validation", rows, cut, rank, world_size),
            num_micro_batches=len(cut),
            global_units=(num_targets := self._store.target_count("validation", rows.spans)),
            global_tokens=num_targets,
            first_position=0,
            num_positions=0,
        )

    def rows_to_try(self) -> Sequence[Row]:
        return ()

    def _micro_batches(
        self, split: Split, rows: RowSpans, cut: Sequence[NDArray[np.int64]], rank: int, world_size: int
    ) -> tuple[StepMicroBatch, ...]:
        return rank_micro_batches(
            cut, rank, world_size, lambda some, number: self._read(split, rows.take(some), number)
        )

    def _read(self, split: Split, rows: RowSpans, number: int) -> StepMicroBatch:
        if rows.by_document:
            read = self._store.read_padded(split, rows.spans)
        else:
            read = self._store.read(split, rows.spans, rows.sequence_length)
        arrays: dict[str, NDArray[np.generic]] = {"inputs": read.inputs_RT, "targets": read.targets_RT}
        if self._job.data.isolate_documents:
            arrays["documents"] = read.documents_RT
        if read.lengths_R is not None:
            arrays["lengths"] = read.lengths_R
        if self._logits is not None:  # packed rows, each a span
            arrays |= self._logits.rows(split, rows.spans.start // rows.sequence_length)
        num_targets = int((read.targets_RT != IGNORED_TARGET).sum())
        return StepMicroBatch(number, on_device(arrays, self._device), num_targets)
