"""The two orders of a run's samples behind one face: rows of a split, or what a curriculum draws."""

import threading
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from orchestrator.sampling.chunks import Chunks, Ints, Spans
from orchestrator.sampling.curriculum import Curriculum, CurriculumState
from orchestrator.sampling.sampler import SamplerState, sample

KEPT = 3  # steps


@dataclass(frozen=True, eq=False)
class RowSpans:
    """Rows, as where their tokens lie.

    Args:
        spans: the rows' tokens, row after row; a span each if `by_document`.
        sequence_length: tokens of a row; if `by_document`, of the longest that there may be.
        by_document: a row is a document, or a piece of a long one. Else all rows are equally long, and may each be of
            several spans.
    """

    spans: Spans
    sequence_length: int
    by_document: bool = False

    @property
    def lengths_R(self) -> Ints:
        """Tokens of each row."""
        if self.by_document:
            return self.spans.length
        return np.full(self.spans.num_tokens // self.sequence_length, self.sequence_length)

    def take(self, rows: Ints) -> "RowSpans":
        """Those of these numbers; consecutive ones, unless rows are by document."""
        if self.by_document:
            return replace(self, spans=self.spans[rows])
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        return replace(self, spans=self.spans.part(first * self.sequence_length, last * self.sequence_length))


@dataclass(frozen=True, eq=False)
class StepTokens:
    """What a step trains on.

    Args:
        stage: its name.
        first_position, num_positions: the rows' places in the whole run.
        rows: in order.
    """

    stage: str
    first_position: int
    num_positions: int
    rows: RowSpans


class Order(Protocol):
    """Which tokens a step trains on. Two exist: without a curriculum and with one."""

    def at(self, step: int) -> StepTokens: ...

    def to_json(self) -> str:
        """All that decides it, for checkpoints."""
        ...


@dataclass(frozen=True)
class RowOrder:
    """All rows of the split in a pseudo-random order, found without memory.

    Args:
        state: whose rows are the split's of one length.
        chunks: given, they are these instead: a row by document.
    """

    state: SamplerState
    chunks: Chunks | None = None

    def at(self, step: int) -> StepTokens:
        batch = sample(self.state, step)
        length, chunks = batch.stage.sequence_length, self.chunks
        if chunks is None:
            rows = RowSpans(Spans(batch.rows * length, np.full(len(batch.rows), length)), length)
        else:
            rows = RowSpans(Spans(chunks.start[batch.rows], chunks.length[batch.rows]), length, by_document=True)
        return StepTokens(batch.stage.name, batch.first_position, len(batch.rows), rows)

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
        of_step = RowSpans(spans, stage.sequence_length, self.state.by_document)
        return StepTokens(stage.name, step * rows, rows, of_step)

    def to_json(self) -> str:
        return self.state.to_json()
