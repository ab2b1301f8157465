"""The order of tokens under a curriculum: a pure function of the chunks, the stages so far and the step.

A stage defines which documents it admits and how long its rows are. Its steps draw admitted documents; once none are
left in the epoch, they draw any others; when the epoch is over, they draw admitted documents of the next one. To end a
stage instead, the caller checks `steps_left` ahead of time and begins the next stage.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

from orchestrator.errors import ProtocolError
from orchestrator.sampling.chunks import Chunks, Spans
from orchestrator.sampling.token_stream import TokenStream

# -- Documents that a stage of a curriculum admits over its steps, by difficulty ---------------------------------------

LEVELS = 64  # limit on the levels of a pace, so that admitted documents are recomputed only that often

Pace = Literal["none", "linear", "root", "step"]


@dataclass(frozen=True)
class Admission:
    """The range of difficulties that a stage admits at each of its steps.

    Args:
        low, high: difficulties [low, high) of the whole stage.
        pace: how the range opens: `none` (all of it from the beginning), `linear`, `root` (by the square root of the
            step: each step adds as many documents as it can train on, Platanis et al., "Competence-based Curriculum
            Learning for Neural Machine Translation", NAACL 2019, equation 7 with p = 2), or `step` (in equal steps).
        start: the share of the range that is open at first.
        num_steps: steps until the whole range is open.
        num_jumps: number of jumps of pace `step`.
        hardest_first: open the range from `high` downwards: an anti-curriculum.

    Raises:
        ValueError: a range outside [0, 1] or an empty one, or a pace that never opens the whole range.
    """

    low: float = 0.0
    high: float = 1.0
    pace: Pace = "none"
    start: float = 1.0
    num_steps: int = 0
    num_jumps: int = 1
    hardest_first: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"difficulties from {self.low} to {self.high}; a range lies within 0 to 1 and isn't empty")
        if not 0 < self.start <= 1 or self.num_jumps < 1:
            raise ValueError(f"a pace begins with a share in (0, 1] and has a jump; got {self.start}, {self.num_jumps}")
        if self.pace != "none" and self.num_steps < 1:
            raise ValueError(f"pace {self.pace} takes {self.num_steps} steps; it takes at least 1")

    def competence(self, step: int) -> float:
        """The open share of the range at a step of the stage, counted from 0."""
        if self.pace == "none" or step >= self.num_steps:
            return 1.0
        done, start = step / self.num_steps, self.start
        if self.pace == "linear":
            share = start + (1 - start) * done
        elif self.pace == "root":
            share = math.sqrt(start**2 + (1 - start**2) * done)
        else:
            share = start + (1 - start) * math.floor(done * (self.num_jumps + 1)) / (self.num_jumps + 1)
        return max(start, math.floor(share * LEVELS) / LEVELS)

    def at(self, step: int) -> tuple[float, float]:
        """The difficulties [low, high) admitted at a step of the stage."""
        width = (self.high - self.low) * self.competence(step)
        return (self.high - width, self.high) if self.hardest_first else (self.low, self.low + width)

    def next_change(self, step: int) -> int | None:
        """The first step after `step` that admits another range; None if there is none."""
        now = self.at(step)
        later = step + 1
        if self.at(max(later, self.num_steps)) == now:
            return None
        high = max(later, self.num_steps)
        while later < high:  # binary search: the admitted range only grows
            middle = (later + high) // 2
            later, high = (middle + 1, high) if self.at(middle) == now else (later, middle)
        return later


# -- Tokens of a step under a curriculum -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BegunStage:
    """A stage that a run has reached, or whose first step is already fixed.

    Args:
        first_step: of the run; earlier than that of the stage after it.
        sequence_length: tokens of a row, or of the longest row.
    """

    name: str
    first_step: int
    sequence_length: int
    admission: Admission


@dataclass(frozen=True)
class CurriculumState:
    """All that determines the order of tokens, besides the chunks. Saved in checkpoints.

    Args:
        seed: of the order.
        global_batch_size: rows in a step.
        stages: by `first_step`, which is 0 for the first.
        by_document: a row is a document, or a piece of a long one; otherwise documents lie back to back in rows of one
            length.

    Raises:
        ValueError: stages that don't follow one another, or a size below 1.
    """

    seed: int
    global_batch_size: int
    num_tokens: int  # of the split; detects most changes of the corpus
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
        """The stage of `step`. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step {step} doesn't exist; steps count from 0")
        return next(stage for stage in reversed(self.stages) if stage.first_step <= step)

    def step_units(self, step: int) -> int:
        """Units that a step consumes: tokens, or rows where these are of unequal length."""
        return self.global_batch_size * (1 if self.by_document else self.stage_at(step).sequence_length)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CurriculumState":
        """Parse the output of `to_json`. Raises ProtocolError for anything else."""
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
    """Iterates over the order of tokens. Consecutive steps are fast; any other step is found from the beginning, in
    time that grows with the stages and their paces, not with the steps.

    Args:
        state: must include all stages up to the requested steps; later stages are allowed.
    """

    def __init__(self, chunks: Chunks, state: CurriculumState) -> None:
        if state.num_tokens != chunks.num_tokens:
            raise ValueError(f"the order is of {state.num_tokens} tokens, the split has {chunks.num_tokens}")
        self._chunks, self.state = chunks, state
        self._rewind()

    def spans(self, step: int) -> Spans:
        """The tokens of a step, row by row; with `by_document`, one span per row."""
        self._go_to(step)
        spans = Spans.joined(list(self._consume(self.state.step_units(step), wanted=True)))
        self._step = step + 1
        return spans

    def steps_left(self, step: int) -> int:
        """Number of steps from `step` on that its stage can take before the admitted part of this epoch is used up, if
        it admits no more than now."""
        self._go_to(step)
        return self._stream.admitted // self.state.step_units(step) if not self._relaxed else 0

    def _rewind(self) -> None:
        self._stream, self._step = TokenStream(self._chunks, self.state.seed), 0
        self._relaxed = False
        self._admitting: tuple[float, float, int | None] | None = None

    def _go_to(self, step: int) -> None:
        """Move to the beginning of `step`, with its range admitted."""
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
        """The first later step at which the admitted range or the length of rows changes."""
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
