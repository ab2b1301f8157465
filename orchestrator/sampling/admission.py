"""Which documents a stage of a curriculum admits, by their difficulty, as it goes on.

Difficulty is a document's place among all of its split: the share of the split's tokens that lies in easier documents,
in [0, 1). So ranges mean the same whatever signal and corpus they are of.
"""

import math
from dataclasses import dataclass
from typing import Literal

LEVELS = 64  # a pace grows in so many levels at most, so that what is admitted is worked out anew only then

Pace = Literal["none", "linear", "root", "step"]


@dataclass(frozen=True)
class Admission:
    """What a stage admits at each of its steps.

    Args:
        low, high: difficulties [low, high) of the whole stage.
        pace: how the range opens: `none` (all of it from the beginning), `linear`, `root` (by the square root of the
            step: each step adds as many documents as it can train on, Platanis et al., "Competence-based Curriculum
            Learning for Neural Machine Translation", NAACL 2019, equation 7 with p = 2), or `step` (in equal steps).
        start: the share of the range that is open at first.
        num_steps: steps until all of it is open.
        num_jumps: of `step`.
        hardest_first: it opens from `high` downwards: an anti-curriculum.

    Raises:
        ValueError: a range outside [0, 1] or an empty one, or a pace that never gets there.
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
        """The share of the range that is open at a step of the stage, counted from 0."""
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
        """The difficulties [low, high) that are admitted at a step of the stage."""
        width = (self.high - self.low) * self.competence(step)
        return (self.high - width, self.high) if self.hardest_first else (self.low, self.low + width)

    def next_change(self, step: int) -> int | None:
        """The first step after `step` that admits something else; None if there is none."""
        now = self.at(step)
        later = step + 1
        if self.at(max(later, self.num_steps)) == now:
            return None
        high = max(later, self.num_steps)
        while later < high:  # what is admitted only grows
            middle = (later + high) // 2
            later, high = (middle + 1, high) if self.at(middle) == now else (later, middle)
        return later
