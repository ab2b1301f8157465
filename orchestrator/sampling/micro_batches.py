"""Into which micro-batches a step's rows are cut, and which rank runs which of them.

The cut depends on the rows and on the size of a micro-batch, never on who trains; a rank takes a contiguous block of
micro-batches, so that results joined in rank order are in micro-batch order.

Shape legend: R = rows of a step, S = micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatchSize:
    """How much a micro-batch (micro-batch) may be. One of `rows` and `tokens` is 0, which says nothing; both: the job's
    own.

    Args:
        rows: rows of it, however long.
        tokens: what its rows take when all are padded to the longest. A row that is longer is a micro-batch by itself.
        multiple: of `tokens`: there are so many micro-batches, or a multiple of that, where there are as many rows.
            Where the size is found by measuring, workers get equally many.
    """

    rows: int = 0
    tokens: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens) < 0 or (self.rows and self.tokens) or self.multiple < 1:
            raise ValueError(f"{self} is no size of a micro-batch: it is of rows or of tokens, and at least 1")

    def __bool__(self) -> bool:
        return bool(self.rows or self.tokens)


UNSAID = MicroBatchSize()
ONE_ROW = MicroBatchSize(rows=1)


def split_into_micro_batches(lengths_R: Ints, size: MicroBatchSize) -> list[Ints]:
    """[S] row numbers of each micro-batch; all rows once.

    Micro-batches of so many rows hold them in their order. Micro-batches of so many tokens hold rows of like length and
    are about equally full: a bucket's padding is what its longest row has over the others, so rows that lie next to
    each other in order of length waste least. Long rows take more time for each token, so micro-batches are in an order
    in which any run of them has about as many long ones as another. Rows of equal length keep their order.

    Raises:
        ValueError: a size that says nothing.
    """
    if not size:
        raise ValueError(f"{size} doesn't say how much a micro-batch may be")
    if not len(lengths_R):
        return []
    if size.rows:
        return np.split(np.arange(len(lengths_R)), range(size.rows, len(lengths_R), size.rows))
    by_length_R = np.argsort(-lengths_R, kind="stable")
    sorted_R = lengths_R[by_length_R]
    num_micro_batches = len(_starts(sorted_R, size.tokens))
    wanted = min(-(-num_micro_batches // size.multiple) * size.multiple, len(lengths_R))
    starts = _starts(sorted_R, _least_tokens(sorted_R, size.tokens, wanted))
    micro_batches = np.split(by_length_R, starts[1:])
    return (
        micro_batches
        if sorted_R[0] == sorted_R[-1]
        else [micro_batches[number] for number in spread(len(micro_batches))]
    )


def spread(count: int) -> list[int]:
    """The numbers below `count` by their bits in reverse, as van der Corput's sequence has them: those that follow one
    another are far apart, and every run of them is spread over all."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


def padded_tokens(lengths_R: Ints, micro_batches: Sequence[Ints]) -> Ints:
    """[S] tokens of each micro-batch when its rows are as long as its longest."""
    return np.array([lengths_R[rows].max(initial=0) * len(rows) for rows in micro_batches], dtype=np.int64)


def _starts(sorted_R: Ints, tokens: int) -> list[int]:
    """Where micro-batches of at most so many tokens begin, each as full as it gets: as few as there can be, as every
    micro-batch ends with the shortest row that it could have."""
    starts, end = [], 0
    while end < len(sorted_R):
        starts.append(end)
        end += max(1, tokens // int(sorted_R[end]))
    return starts


def _least_tokens(sorted_R: Ints, tokens: int, num_micro_batches: int) -> int:
    """The smallest size of micro-batches, up to `tokens`, that takes no more than `num_slots`: with it they are about
    equally full."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_starts(sorted_R, middle)) <= num_micro_batches else (middle + 1, high)
    return low


def micro_batches_of(rank: int, world_size: int, num_micro_batches: int) -> range:
    """The micro-batches of `rank`: balanced contiguous blocks, the first ranks have one more. May be empty.

    Raises:
        ValueError: a rank outside the world, an empty world, or a negative number of micro-batches.
    """
    _check(world_size, num_micro_batches)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}; ranks run from 0 to {world_size - 1}")
    share, extra = divmod(num_micro_batches, world_size)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def max_micro_batches(world_size: int, num_micro_batches: int) -> int:
    """Forward passes that every rank runs: a rank with fewer micro-batches runs the rest with no rows, or peers
    deadlock."""
    _check(world_size, num_micro_batches)
    return -(-num_micro_batches // world_size)


def _check(world_size: int, num_micro_batches: int) -> None:
    if world_size < 1 or num_micro_batches < 0:
        raise ValueError(
            f"{num_micro_batches} micro-batches over {world_size} ranks: "
            "needs at least 1 rank and no fewer than 0 micro-batches"
        )
