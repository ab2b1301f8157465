"""The rows of a step: from the sampler's order to this rank's slots as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.data.manifest import Split
from orchestrator.data.order import Orders
from orchestrator.data.store import TokenStore
from orchestrator.model.batch import MicroBatch
from orchestrator.protocol.messages import StageStart
from orchestrator.sampling.chunks import Spans
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
        stage: of the curriculum; empty without one.
        sequence_length: tokens of a row.
    """

    slots: tuple[Slot, ...]
    num_slots: int
    global_tokens: int
    first_position: int
    num_positions: int
    stage: str = ""
    sequence_length: int = 0


class Feed:
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
        rows = min(job.eval.rows, store.num_rows("validation", self._length))
        self._validation = store.spans("validation", np.arange(rows, dtype=np.int64), self._length)

    @property
    def first_order(self) -> str:
        """What a run begins with, as it is saved."""
        return self._orders.first.to_json()

    def follow(self, saved: str) -> None:
        """From now on the order of samples is a saved one. Raises ProtocolError for what is none."""
        if saved != self.order.to_json():
            self.order = self._orders.saved(saved)

    def decide(self, stages: Sequence[StageStart], first_step: int) -> None:
        """From now on what was decided is followed, from `first_step` on. Raises ValueError, DataError for what can't
        be."""
        self.order = self._orders.decided(self.order, stages, first_step)

    def step(self, step: int, rank: int, world_size: int, micro_batch: int) -> StepFeed:
        """This rank's part of a training step, in slots of `micro_batch` rows."""
        wanted = self.order.at(step)
        length = wanted.sequence_length
        return StepFeed(
            slots=self._slots("train", wanted.spans, length, rank, world_size, micro_batch),
            num_slots=-(-wanted.num_positions // micro_batch),
            global_tokens=self._store.target_count("train", wanted.spans),
            first_position=wanted.first_position,
            num_positions=wanted.num_positions,
            stage=wanted.stage if self._job.curriculum else "",
            sequence_length=length,
        )

    def validation(self, rank: int, world_size: int, micro_batch: int) -> StepFeed:
        """This rank's part of a validation: always the same rows."""
        spans = self._validation
        return StepFeed(
            slots=self._slots("validation", spans, self._length, rank, world_size, micro_batch),
            num_slots=-(-spans.num_tokens // self._length // micro_batch),
            global_tokens=self._store.target_count("validation", spans),
            first_position=0,
            num_positions=0,
        )

    def _slots(
        self, split: Split, spans: Spans, length: int, rank: int, world_size: int, size: int
    ) -> tuple[Slot, ...]:
        tokens = size * length
        num_slots = -(-spans.num_tokens // tokens)
        mine = list(slots_of(rank, world_size, num_slots))
        slots = [Slot(n, self._read(split, spans.part(n * tokens, (n + 1) * tokens), length)) for n in mine]
        while len(slots) < max_slots(world_size, num_slots):
            slots.append(Slot(None, self._read(split, spans.part(0, 0), length)))
        return tuple(slots)

    def _read(self, split: Split, spans: Spans, length: int) -> MicroBatch:
        read = self._store.read(split, spans, length)
        documents = torch.from_numpy(read.documents_RT) if self._job.data.isolate_documents else None
        return MicroBatch(
            inputs_BT=torch.from_numpy(read.inputs_RT).to(self._device),
            targets_BT=torch.from_numpy(read.targets_RT).to(self._device),
            documents_BT=None if documents is None else documents.to(self._device),
        )
