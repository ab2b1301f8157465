"""Steps of rows of arrays, which a task collates to micro-batches."""

from collections.abc import Sequence

import numpy as np
import torch

from orchestrator.data.manifest import Split
from orchestrator.data.rows.row_store import RowStore
from orchestrator.errors import DataError
from orchestrator.model.task import Row, Task
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Ints, Spans
from orchestrator.sampling.micro_batches import MicroBatchSize, padded_tokens, split_into_micro_batches
from orchestrator.sampling.sample_order import WHOLE, Order, RowOrder, RowSpans, StepTokens
from orchestrator.sampling.sampler import SamplerState
from orchestrator.spec.job import JobSpec
from orchestrator.worker.step.batches import StepBatches, StepMicroBatch, on_device, rank_micro_batches

VALIDATION = 0  # in place of a step, in seeds of what collating draws; training steps count from 1 there


class RowBatches:
    """Reads steps from a store of rows (`orchestrator.worker.step.batches.BatchReader`). To the sample order, which
    gives positions of tokens, each row is one token.

    Args:
        job: batch sizes, seed.
        store: the prepared rows.
        task: collates them.
    """

    is_local = True

    def __init__(self, job: JobSpec, store: RowStore, task: Task, device: torch.device) -> None:
        self._job, self._store, self._task, self._device = job, store, task, device
        train = job.train
        state = SamplerState(train.seed, train.global_batch_size, 1, store.num_rows("train"))
        self._first = RowOrder(state)
        self.order: Order = self._first
        numbers = np.arange(min(job.eval.rows, store.num_rows("validation")), dtype=np.int64)
        self._validation = StepTokens(WHOLE, 0, 0, RowSpans(Spans(numbers, np.ones_like(numbers)), 1))

    @property
    def first_order(self) -> str:
        return self._first.to_json()

    def follow(self, saved: str) -> None:
        if saved != self.order.to_json():
            self.order = RowOrder(SamplerState.from_json(saved))

    def decide(self, stages: Sequence[StageStart], first_step: int) -> None:
        if stages:
            raise DataError("stages of a curriculum order text, and this run's data are rows")

    def step(self, step: int, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        return self._batches("train", self.order.at(step), step + 1, rank, world_size, size)

    def validation(self, rank: int, world_size: int, size: MicroBatchSize) -> StepBatches:
        return self._batches("validation", self._validation, VALIDATION, rank, world_size, size)

    def spans(self, order: Order, step: int, rank: int, world_size: int, size: MicroBatchSize) -> Spans:
        return order.at(step).rows.spans

    def fetch(self, spans: Spans) -> bool:
        return True

    def rows_to_try(self) -> Sequence[Row]:
        first = self._store.read("train", np.arange(min(2, self._store.num_rows("train")), dtype=np.int64))
        unlike = self._store.unlike_first()
        return first if unlike is None else [first[0], *self._store.read(unlike[0], np.array([unlike[1]]))]

    def _batches(
        self, split: Split, wanted: StepTokens, step: int, rank: int, world_size: int, size: MicroBatchSize
    ) -> StepBatches:
        rows_R = wanted.rows.spans.start
        lengths_R = self._store.lengths(split, rows_R)
        cut = split_into_micro_batches(lengths_R, size)

        def read(some: Ints, number: int) -> StepMicroBatch:
            return self._read(split, rows_R[some], step, number)

        return StepBatches(
            micro_batches=rank_micro_batches(cut, rank, world_size, read),
            num_micro_batches=len(cut),
            global_units=int(self._store.units(split, rows_R).sum()),
            global_tokens=int(lengths_R.sum()),
            first_position=wanted.first_position,
            num_positions=wanted.num_positions,
            sequence_length=self._job.train.sequence_length if self._job.has_tokens else 1,
            tokens=tuple(int(lengths_R[some].sum()) for some in cut),
            padded_tokens=tuple(padded_tokens(lengths_R, cut).tolist()),
        )

    def _read(self, split: Split, rows_R: Ints, step: int, number: int) -> StepMicroBatch:
        rng = np.random.default_rng((self._job.train.seed, step, number))
        # Tasks collate rows; arrays of no rows are those of one row, cut.
        some = rows_R if len(rows_R) else np.zeros(1, np.int64)
        arrays = self._task.collate(self._store.read(split, some), rng)
        if not len(rows_R):
            arrays = {name: array[:0] for name, array in arrays.items()}
        units = int(self._store.units(split, rows_R).sum())
        return StepMicroBatch(number, on_device(arrays, self._device), units, scale=units)
