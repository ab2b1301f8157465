"""The rows of a step: from the sampler's order to this rank's slots as tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.manifest import Split
from orchestrator.data.store import TokenStore
from orchestrator.model.batch import MicroBatch
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.sampling.slots import max_slots, slots_of
from orchestrator.spec.job import JobSpec


@dataclass(frozen=True)
class Slot:
    """A micro-batch and its number in the global batch; the number is None for a pass that only keeps step."""

    number: int | None
    batch: MicroBatch


@dataclass(frozen=True)
class StepFeed:
    """What one rank does in a step.

    Args:
        slots: as many on every rank; a rank without a slot left has a batch of no rows.
        num_slots: slots of the whole global batch.
        global_tokens: targets in the whole global batch.
        first_position, num_positions: the sample positions that the step consumes.
    """

    slots: tuple[Slot, ...]
    num_slots: int
    global_tokens: int
    first_position: int
    num_positions: int


class Feed:
    """Reads steps from the packed store.

    Args:
        job: batch sizes, row length, document isolation.
        store: the prepared corpus.
    """

    def __init__(self, job: JobSpec, store: TokenStore, device: torch.device) -> None:
        train = job.train
        self._job, self._store, self._device = job, store, device
        self._length = train.sequence_length
        self.sampler = SamplerState.of_one_stage(
            seed=train.seed,
            global_batch_size=train.global_batch_size,
            sequence_length=train.sequence_length,
            num_rows=store.num_rows("train", train.sequence_length),
        )
        rows = min(job.eval.rows, store.num_rows("validation", self._length))
        self._validation_rows = np.arange(rows, dtype=np.int64)

    def step(self, step: int, rank: int, world_size: int, micro_batch: int) -> StepFeed:
        """This rank's part of a training step, in slots of `micro_batch` rows."""
        batch = sample(self.sampler, step)
        return StepFeed(
            slots=self._slots("train", batch.rows, rank, world_size, micro_batch),
            num_slots=-(-len(batch.rows) // micro_batch),
            global_tokens=self._store.target_count("train", batch.rows, self._length),
            first_position=batch.first_position,
            num_positions=len(batch.rows),
        )

    def validation(self, rank: int, world_size: int, micro_batch: int) -> StepFeed:
        """This rank's part of a validation: always the same rows."""
        rows = self._validation_rows
        return StepFeed(
            slots=self._slots("validation", rows, rank, world_size, micro_batch),
            num_slots=-(-len(rows) // micro_batch),
            global_tokens=self._store.target_count("validation", rows, self._length),
            first_position=0,
            num_positions=0,
        )

    def _slots(self, split: Split, rows: NDArray[np.int64], rank: int, world_size: int, size: int) -> tuple[Slot, ...]:
        num_slots = -(-len(rows) // size)
        mine = list(slots_of(rank, world_size, num_slots))
        slots = [Slot(n, self._read(split, rows[n * size : (n + 1) * size])) for n in mine]
        while len(slots) < max_slots(world_size, num_slots):
            slots.append(Slot(None, self._read(split, rows[:0])))
        return tuple(slots)

    def _read(self, split: Split, rows: NDArray[np.int64]) -> MicroBatch:
        read = self._store.rows(split, rows, self._length)
        documents = torch.from_numpy(read.documents_RT) if self._job.data.isolate_documents else None
        return MicroBatch(
            inputs_BT=torch.from_numpy(read.inputs_RT).to(self._device),
            targets_BT=torch.from_numpy(read.targets_RT).to(self._device),
            documents_BT=None if documents is None else documents.to(self._device),
        )
