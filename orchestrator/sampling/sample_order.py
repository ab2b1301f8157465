"""A common interface for the two orders of a run's samples: rows of a split, or the draws of a curriculum."""

import threading
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from orchestrator.sampling.chunks import Chunks, Ints, Spans
from orchestrator.sampling.curriculum import Curriculum, CurriculumState
from orchestrator.sampling.sampler import SamplerState, sample

WHOLE = "all"  # stage of a run without a curriculum
KEPT = 67  # newest steps of a curriculum whose spans are cached


@dataclass(frozen=True, eq=False)
class RowSpans:
    """Rows, given as the positions of their tokens.

    Args:
        spans: the rows' tokens, row after row; one span per row if `by_document`.
        sequence_length: tokens of a row; if `by_document`, the limit for the longest row.
        by_document: a row is a document, or a piece of a long one. Otherwise all rows are equally long, and each may
            consist of several spans.
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
        """The rows with these indices; they must be consecutive unless rows are by document."""
        if self.by_document:
            return replace(self, spans=self.spans[rows])
        first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
        return replace(self, spans=self.spans.part(first * self.sequence_length, last * self.sequence_length))


@dataclass(frozen=True, eq=False)
class StepTokens:
    """The rows that a step trains on.

    Args:
        stage: name of the stage.
        first_position, num_positions: the rows' positions in the whole run.
        rows: in order.
    """

    stage: str
    first_position: int
    num_positions: int
    rows: RowSpans


class Order(Protocol):
    """The order of tokens over steps. Two implementations: without a curriculum and with one."""

    def at(self, step: int) -> StepTokens: ...

    def to_json(self) -> str:
        """The state that determines the order, for checkpoints."""
        ...


@dataclass(frozen=True)
class RowOrder:
    """All rows of the split in a pseudo-random order, computed without memory.

    Args:
        state: sampler state over the split's rows, which are of one length.
        chunks: if given, these are the rows instead: one row per document or piece.
    """

    state: SamplerState
    chunks: Chunks | None = None

    def at(self, step: int) -> StepTokens:
        rows_R, length, chunks = sample(self.state, step), self.state.sequence_length, self.chunks
        if chunks is None:
            rows = RowSpans(Spans(rows_R * length, np.full(len(rows_R), length)), length)
        else:
            rows = RowSpans(Spans(chunks.start[rows_R], chunks.length[rows_R]), length, by_document=True)
        return StepTokens(WHOLE, step * len(rows_R), len(rows_R), rows)

    def to_json(self) -> str:
        return self.state.to_json()


class CurriculumOrder:
    """The order of a curriculum's stages. Safe from any thread."""

    def __init__(self, chunks: Chunks, state: CurriculumState) -> None:
        self.state = state
        self._curriculum = Curriculum(chunks, state)
        self._lock = threading.Lock()  # the curriculum has a current position
        # Prefetched steps are requested again, and going back costs more than the next step.
        self._newest: dict[int, Spans] = {}

    def at(self, step: int) -> StepTokens:
        stage, rows = self.state.stage_at(step), self.state.global_batch_size
        with self._lock:
            spans = self._newest.get(step)
            if spans is None:
                spans = self._newest[step] = self._curriculum.spans(step)
                if len(self._newest) > KEPT:
                    del self._newest[next(iter(self._newest))]  # the first one of them that was computed
        of_step = RowSpans(spans, stage.sequence_length, self.state.by_document)
        return StepTokens(stage.name, step * rows, rows, of_step)

    def to_json(self) -> str:
        return self.state.to_json()
