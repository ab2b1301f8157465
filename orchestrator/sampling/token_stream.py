"""The stream of tokens that a curriculum trains on: admitted and not yet consumed tokens, epoch after epoch.

An epoch is one pass over all chunks of the split, in its own order, derived from the seed; a stage consumes the chunks
that it admits in that order and leaves the others to later stages. A chunk that a step has begun is finished by the
next step that admits it, whatever the length of its rows: no token is lost or trained on twice within an epoch. When
less is left of an epoch than a step takes, the next one begins in the middle of the step.

Draws are counted in *units*: tokens, or rows, a chunk having as many rows as its length takes; its last row may be
shorter.

The stream follows from the chunks, the seed and the stages. It knows neither world size, ranks nor the clock.
"""

import numpy as np

from orchestrator.sampling.chunks import Chunks, Ints, Spans
from orchestrator.sampling.permutation import mixed


class TokenStream:
    """A position in an order of tokens. Draws advance it; streams with the same draws are equal."""

    def __init__(self, chunks: Chunks, seed: int) -> None:
        self._chunks, self._seed = chunks, seed
        self._range = (0.0, 1.0)
        self._row_length: int | None = None
        self.epoch = -1
        self._begin_epoch()

    def admit(self, low: float, high: float, row_length: int | None = None) -> None:
        """From now on draw only chunks of difficulties [low, high): tokens, or rows of at most `row_length` tokens."""
        self._range, self._row_length = (low, high), row_length
        order = self._order
        difficulty = self._chunks.difficulty[order]
        self._next = order[(self._left[order] > 0) & (low <= difficulty) & (difficulty < high)]
        self._ends = np.cumsum(-(-self._left[self._next] // self._unit))
        self._drawn = 0

    @property
    def _unit(self) -> int:
        """Tokens of a unit, except for a chunk's last one."""
        return self._row_length or 1

    @property
    def admitted(self) -> int:
        """Units left in the epoch within the admitted range."""
        return (int(self._ends[-1]) if len(self._ends) else 0) - self._drawn

    @property
    def is_over(self) -> bool:
        """Whether nothing is left of the epoch, admitted or not. Call after `settle`."""
        return not self._left.any()

    def draw(self, num_units: int) -> Spans:
        """The next units; rows as one span each. Raises ValueError for more than are `admitted`."""
        if num_units > self.admitted:
            raise ValueError(f"{num_units} units were asked for; {self.admitted} are admitted and left")
        begin, end = self._drawn, self._drawn + num_units
        first, last = np.searchsorted(self._ends, [begin, end], side="right").tolist()
        last = min(last, len(self._next) - 1)
        touched = self._next[first : last + 1]
        left, ends = self._left[touched], self._ends[first : last + 1]
        begins = ends - -(-left // self._unit)
        low, high = np.maximum(begins, begin) - begins, np.minimum(ends, end) - begins  # units of each chunk
        self._drawn = end
        start = self._chunks.start[touched] + self._chunks.length[touched] - left
        if self._row_length is None:
            return Spans(start + low, high - low).some()
        chunk = np.repeat(np.arange(len(touched)), high - low)
        nth = np.arange(len(chunk)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + low[chunk]
        before = nth * self._row_length
        return Spans(start[chunk] + before, np.minimum(self._row_length, left[chunk] - before))

    def skip(self, num_units: int) -> None:
        """Advance like `draw`, without returning spans."""
        if num_units > self.admitted:
            raise ValueError(f"{num_units} units were to be skipped; {self.admitted} are admitted and left")
        self._drawn += num_units

    def settle(self) -> None:
        """Deduct the drawn units from the epoch. Nothing is admitted afterwards."""
        whole = int(np.searchsorted(self._ends, self._drawn, side="right"))
        if whole < len(self._next):
            before = int(self._ends[whole - 1]) if whole else 0
            self._left[self._next[whole]] -= (self._drawn - before) * self._unit
        self._left[self._next[:whole]] = 0
        self._next, self._ends, self._drawn = self._next[:0], self._ends[:0], 0

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._left: Ints = self._chunks.length.copy()
        keys = mixed(self._seed, self.epoch, self._chunks.start)
        self._order = np.argsort(keys, kind="stable")
        self.admit(*self._range, self._row_length)

    def next_epoch(self) -> None:
        """Begin the next pass. Raises ValueError if anything of this one is left."""
        if not self.is_over:
            raise ValueError(f"{int(self._left.sum())} tokens of epoch {self.epoch} are not consumed")
        self._begin_epoch()
