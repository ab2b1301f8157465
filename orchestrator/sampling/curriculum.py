"""Which tokens a step trains on under a curriculum: a pure function of the chunks, the stages so far and the step.

A stage says what it admits and how long its rows are. While it lasts, its steps draw what it admits; when nothing of
that is left in the epoch, whatever else is; when the epoch is over, of the next one again what it admits. Whoever wants
a stage to end instead asks `steps_left` ahead of time and begins the next one.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise

from orchestrator.errors import ProtocolError
from orchestrator.sampling.admission import Admission
from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.token_stream import Stream


@dataclass(frozen=True)
class BegunStage:
    """A stage that a run has come to, or knows that it will.

    Args:
        first_step: of the run; earlier than that of the stage after it.
        sequence_length: tokens of a row, or of the longest.
    """

    name: str
    first_step: int
    sequence_length: int
    admission: Admission


@dataclass(frozen=True)
class CurriculumState:
    """All that decides the order of tokens, beside the chunks. Saved with checkpoints.

    Args:
        seed: of the order.
        global_batch_size: rows in a step.
        stages: by `first_step`, which is 0 for the first.
        by_document: a row is a document, or a piece of a long one; else documents lie back to back in rows of one
            length.

    Raises:
        ValueError: stages that don't follow one another, or a size below 1.
    """

    seed: int
    global_batch_size: int
    num_tokens: int  # of the split: another corpus has another number, most likely
    stages: tuple[BegunStage, ...]
    by_document: bool = False

    def __post_init__(self) -> None:
        if self.global_batch_size < 1 or any(stage.sequence_length < 1 for stage in self.stages):
            raise ValueError(f"a step has at least 1 row of at least 1 token; got {self}")
        if not self.stages or self.stages[0].first_step != 0:
            raise ValueError(f"the first stage begins at step 0; the stages are {self.stages}")
        for before, after in pairwise(self.stages):
            if after.first_step <= before.first_step:
                raise ValueError(f"{after} doesn't follow {before}; it must begin at a later step")

    def stage_at(self, step: int) -> BegunStage:
        """The stage that `step` belongs to. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step {step} doesn't exist; steps count from 0")
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def step_units(self, step: int) -> int:
        """What a step takes: tokens, or rows where these are of unequal length."""
        return self.global_batch_size * (1 if self.by_document else self.stage_at(step).sequence_length)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CurriculumState":
        """What `to_json` wrote. Raises ProtocolError for anything else."""
        try:
            state = json.loads(text)
            stages = tuple(
                BegunStage(**{**stage, "admission": Admission(**stage["admission"])}) for stage in state["stages"]
            )
            return cls(**{**state, "stages": stages})
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(
                f"a saved curriculum doesn't fit: {error!r}",
                remedy="Resume from another checkpoint, or with the version that wrote this one.",
                unchanged="The order of samples was not changed.",
            ) from error


class Curriculum:
    """Walks through the order of tokens. Steps one after the other are fast; any other is found from the beginning, in
    time that grows with the stages and their paces, not with the steps.

    Args:
        state: its stages may be more than the step that is asked for needs, never fewer.
    """

    def __init__(self, chunks: Chunks, state: CurriculumState) -> None:
        if state.num_tokens != chunks.num_tokens:
            raise ValueError(f"the order is of {state.num_tokens} tokens, the split has {chunks.num_tokens}")
        self._chunks, self.state = chunks, state
        self._rewind()

    def spans(self, step: int) -> Spans:
        """The tokens of a step, row by row: by document, a span each."""
        self._go_to(step)
        spans = Spans.joined(list(self._consume(self.state.step_units(step), wanted=True)))
        self._step = step + 1
        return spans

    def steps_left(self, step: int) -> int:
        """How many steps from `step` on its stage can do before nothing that it admits is left in this epoch, if it
        admits no more than now."""
        self._go_to(step)
        return self._stream.admitted // self.state.step_units(step) if not self._relaxed else 0

    def _rewind(self) -> None:
        self._stream, self._step = Stream(self._chunks, self.state.seed), 0
        self._relaxed = False
        self._admitting: tuple[float, float, int | None] | None = None

    def _go_to(self, step: int) -> None:
        """Be before `step`, with what it admits admitted."""
        if step < self._step:
            self._rewind()
        while True:
            stage = self.state.stage_at(self._step)
            length = stage.sequence_length if self.state.by_document else None
            self._admit(*stage.admission.at(self._step - stage.first_step), length)
            if self._step == step:
                return
            until = min(self._next_change(stage), step)
            num_units = (until - self._step) * self.state.step_units(self._step)
            for _ in self._consume(num_units, wanted=False):
                pass
            self._step = until

    def _next_change(self, stage: BegunStage) -> int:
        """The first step after this one at which something else is admitted, or rows are of another length."""
        later = [s.first_step for s in self.state.stages if s.first_step > self._step]
        change = stage.admission.next_change(self._step - stage.first_step)
        if change is not None:
            later.append(stage.first_step + change)
        return min(later, default=1 << 62)

    def _admit(self, low: float, high: float, row_length: int | None) -> None:
        wanted = (low, high, row_length)
        if self._admitting != wanted:
            self._stream.settle()
            self._stream.admit(*wanted)
            self._admitting, self._relaxed = wanted, False

    def _consume(self, num_units: int, wanted: bool) -> Iterator[Spans]:
        stream = self._stream
        while num_units:
            now = min(num_units, stream.admitted)
            if now:
                if wanted:
                    yield stream.draw(now)
                else:
                    stream.skip(now)
                num_units -= now
                continue
            stream.settle()
            assert self._admitting is not None
            if self._relaxed or stream.is_over:
                stream.next_epoch()
                stream.admit(*self._admitting)
                self._relaxed = False
            else:
                stream.admit(0.0, 1.0, self._admitting[2])
                self._relaxed = True
