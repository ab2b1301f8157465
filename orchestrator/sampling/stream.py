"""The tokens that a curriculum trains on, in order: what is admitted and not yet consumed, an epoch after the other.

An epoch is one pass over all chunks of the split. It has an order of its own, made from the seed; a stage consumes the
chunks that it admits in that order and leaves the others to later stages. A chunk that a step has begun is finished by
whichever step comes next and admits it, whatever the length of its rows: no token is lost or trained on twice within an
epoch. When less is left of an epoch than a step takes, the next one begins in the middle of the step.

All of it follows from the chunks, the seed and the stages. Nothing here knows world size, ranks or the clock.
"""

import numpy as np

from orchestrator.sampling.chunks import Chunks, Ints, Spans
from orchestrator.sampling.permutation import mixed


class Stream:
    """Where an order of tokens has come to. Draws change it; two that have drawn the same are equal.

    Args:
        seed: of the order.
    """

    def __init__(self, chunks: Chunks, seed: int) -> None:
        self._chunks, self._seed = chunks, seed
        self._range = (0.0, 1.0)
        self.epoch = -1
        self._begin_epoch()

    def admit(self, low: float, high: float) -> None:
        """From now on draw chunks of difficulties [low, high) only."""
        self._range = (low, high)
        order = self._order
        difficulty = self._chunks.difficulty[order]
        self._next = order[(self._left[order] > 0) & (low <= difficulty) & (difficulty < high)]
        self._ends = np.cumsum(self._left[self._next])
        self._drawn = 0

    @property
    def admitted_tokens(self) -> int:
        """Left of the epoch within what is admitted."""
        return (int(self._ends[-1]) if len(self._ends) else 0) - self._drawn

    @property
    def unconsumed_tokens(self) -> int:
        """Left of the epoch, admitted or not."""
        return int(self._left.sum()) - self._drawn

    def draw(self, num_tokens: int) -> Spans:
        """The next tokens. Raises ValueError for more than `admitted_tokens`."""
        if num_tokens > self.admitted_tokens:
            raise ValueError(f"{num_tokens} tokens were asked for; {self.admitted_tokens} are admitted and left")
        begin, end = self._drawn, self._drawn + num_tokens
        first, last = np.searchsorted(self._ends, [begin, end], side="right").tolist()
        last = min(last, len(self._next) - 1)
        touched = self._next[first : last + 1]
        ends = self._ends[first : last + 1]
        begins = ends - self._left[touched]
        taken = np.minimum(ends, end) - np.maximum(begins, begin)
        start = self._chunks.start[touched] + self._chunks.length[touched] - self._left[touched]
        start = start + np.maximum(begins, begin) - begins
        self._drawn = end
        some = taken > 0
        return Spans(start[some], taken[some])

    def skip(self, num_tokens: int) -> None:
        """As `draw`, for whoever needs none of them."""
        if num_tokens > self.admitted_tokens:
            raise ValueError(f"{num_tokens} tokens were to be skipped; {self.admitted_tokens} are admitted and left")
        self._drawn += num_tokens

    def settle(self) -> None:
        """Enter what was drawn. Nothing is admitted then."""
        whole = int(np.searchsorted(self._ends, self._drawn, side="right"))
        if whole < len(self._next):
            before = int(self._ends[whole - 1]) if whole else 0
            self._left[self._next[whole]] -= self._drawn - before
        self._left[self._next[:whole]] = 0
        self._next, self._ends, self._drawn = self._next[:0], self._ends[:0], 0

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._left: Ints = self._chunks.length.copy()
        keys = mixed(self._seed, self.epoch, self._chunks.start)
        self._order = np.argsort(keys, kind="stable")
        self.admit(*self._range)

    def next_epoch(self) -> None:
        """Begin the next pass. Raises ValueError if something of this one is left."""
        if self.unconsumed_tokens:
            raise ValueError(f"{self.unconsumed_tokens} tokens of epoch {self.epoch} are not consumed")
        self._begin_epoch()
