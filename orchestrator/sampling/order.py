"""The two orders of a run's samples behind one face: rows of a split, or what a curriculum draws."""

import threading
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.curriculum import Curriculum, CurriculumState
from orchestrator.sampling.sampler import SamplerState, sample

KEPT = 3  # steps


@dataclass(frozen=True, eq=False)
class StepTokens:
    """What a step trains on.

    Args:
        stage: its name.
        first_position, num_positions: the rows' places in the whole run.
        sequence_length: tokens of a row.
        spans: the rows' tokens, row after row.
    """

    stage: str
    first_position: int
    num_positions: int
    sequence_length: int
    spans: Spans


class Order(Protocol):
    """Which tokens a step trains on. Two exist: without a curriculum and with one."""

    def at(self, step: int) -> StepTokens: ...

    def to_json(self) -> str:
        """All that decides it, for checkpoints."""
        ...


@dataclass(frozen=True)
class RowOrder:
    """All rows of the split in a pseudo-random order, found without memory."""

    state: SamplerState

    def at(self, step: int) -> StepTokens:
        batch = sample(self.state, step)
        length = batch.stage.sequence_length
        spans = Spans(batch.rows * length, np.full(len(batch.rows), length))
        return StepTokens(batch.stage.name, batch.first_position, len(batch.rows), length, spans)

    def to_json(self) -> str:
        return self.state.to_json()


class CurriculumOrder:
    """What stages admit. From any thread."""

    def __init__(self, chunks: Chunks, state: CurriculumState) -> None:
        self.state = state
        self._curriculum = Curriculum(chunks, state)
        self._lock = threading.Lock()  # it walks
        self._newest: dict[int, Spans] = {}  # steps that were read ahead are asked for again after a rescale

    def at(self, step: int) -> StepTokens:
        stage, rows = self.state.stage_at(step), self.state.global_batch_size
        with self._lock:
            spans = self._newest.get(step)
            if spans is None:
                spans = self._newest[step] = self._curriculum.spans(step)
                for old in sorted(self._newest)[:-KEPT]:
                    del self._newest[old]
        return StepTokens(stage.name, step * rows, rows, stage.sequence_length, spans)

    def to_json(self) -> str:
        return self.state.to_json()
