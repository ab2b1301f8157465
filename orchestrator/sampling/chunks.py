"""The training split as chunks, documents with long ones divided, which a curriculum draws from in its own order."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Chunks:
    """C chunks in the order of their tokens; together they cover the whole split.

    Args:
        start: [C], position of the first token in the split.
        length: [C], tokens.
        difficulty: [C], of the chunk's document: the share of the split's tokens in easier documents, in [0, 1).
    """

    start: Ints
    length: Ints
    difficulty: NDArray[np.float64]

    @classmethod
    def of(cls, lengths_D: Ints, scores_D: NDArray[np.float64], max_length: int) -> Self:
        """Divide documents that lie back to back into chunks.

        Args:
            lengths_D: tokens of each document, at least 1.
            scores_D: higher is harder; documents of equal score rank as harder the later they come.
            max_length: largest length of a chunk.

        Raises:
            ValueError: no documents, a chunk of no tokens, or a score that isn't finite.
        """
        if not len(lengths_D) or max_length < 1 or len(lengths_D) != len(scores_D) or lengths_D.min() < 1:
            raise ValueError(f"{len(lengths_D)} documents in chunks of {max_length}; both take at least 1")
        if not np.isfinite(scores_D).all():
            raise ValueError(f"document {int(np.argmin(np.isfinite(scores_D)))} has no score; a curriculum needs all")
        by_score = np.argsort(scores_D, kind="stable")
        easier = np.empty(len(lengths_D))
        easier[by_score] = np.append(0, np.cumsum(lengths_D[by_score])[:-1]) / lengths_D.sum()

        counts_D = -(-lengths_D // max_length)
        document = np.repeat(np.arange(len(lengths_D)), counts_D)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
        starts_D = np.cumsum(lengths_D) - lengths_D
        return cls(
            start=starts_D[document] + nth * max_length,
            length=np.minimum(max_length, lengths_D[document] - nth * max_length),
            difficulty=easier[document],
        )

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())


@dataclass(frozen=True, eq=False)
class Spans:
    """S runs of tokens, in order.

    Args:
        start: [S], position of the first token in the split.
        length: [S], tokens, at least 1.
    """

    start: Ints
    length: Ints

    def __getitem__(self, which: Ints) -> "Spans":
        """The spans with these indices, in this order."""
        return Spans(self.start[which], self.length[which])

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    def places(self) -> Ints:
        """[num_tokens], the position of every token."""
        begins = np.cumsum(self.length) - self.length
        places: Ints = np.arange(self.num_tokens) + np.repeat(self.start - begins, self.length)
        return places

    def part(self, begin: int, end: int) -> "Spans":
        """Tokens [begin, end) of the concatenated spans, counted from 0."""
        ends = np.cumsum(self.length)
        begins = ends - self.length
        low, high = np.maximum(begins, begin), np.minimum(ends, end)
        return Spans(self.start + low - begins, high - low).some()

    def some(self) -> "Spans":
        """The spans of at least one token."""
        some = self.length > 0
        return Spans(self.start[some], self.length[some])

    @classmethod
    def joined(cls, parts: "list[Spans]") -> "Spans":
        return cls(np.concatenate([p.start for p in parts]), np.concatenate([p.length for p in parts]))
