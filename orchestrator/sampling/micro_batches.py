"""Division of a step's rows into micro-batches, and assignment of micro-batches to ranks.

The division depends on the rows and on the micro-batch size, never on the workers; a rank takes a contiguous block of
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
    """The size of a micro-batch, in rows or in tokens. The other one is 0; both are 0 for the job's own size.

    Args:
        rows: rows of it, of any length.
        tokens: tokens of its rows, all padded to the longest. A longer row is a micro-batch by itself.
        multiple: for `tokens`: the number of micro-batches is a multiple of this, if there are as many rows. Used where
            the size is found by measuring, so that workers get equally many.
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
    """[S] row indices of each micro-batch; every row once.

    Micro-batches sized in rows keep the order of the rows. Micro-batches sized in tokens hold rows of similar length
    and are about equally full: padding fills rows up to the longest, so rows that are adjacent in order of length waste
    least. Long rows take more time per token, so micro-batches are ordered such that any run of them has about as many
    long ones as another. Rows of equal length keep their order.

    Raises:
        ValueError: a size of neither rows nor tokens.
    """
    if not size:
        raise ValueError(f"{size} sets neither rows nor tokens of a micro-batch")
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
    """The numbers below `count` by their reversed bits, as in van der Corput's sequence: adjacent ones are far apart,
    and every run of them is spread over the whole range."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


def padded_tokens(lengths_R: Ints, micro_batches: Sequence[Ints]) -> Ints:
    """[S] tokens of each micro-batch with its rows padded to the longest."""
    return np.array([lengths_R[rows].max(initial=0) * len(rows) for rows in micro_batches], dtype=np.int64)


def _starts(sorted_R: Ints, tokens: int) -> list[int]:
    """Start of each micro-batch of at most `tokens` tokens, filled greedily: the fewest possible, as every micro-batch
    ends with the shortest row that it could have."""
    starts, end = [], 0
    while end < len(sorted_R):
        starts.append(end)
        end += max(1, tokens // int(sorted_R[end]))
    return starts


def _least_tokens(sorted_R: Ints, tokens: int, num_micro_batches: int) -> int:
    """The smallest size, up to `tokens`, that takes no more than `num_micro_batches`: it makes them about equally
    full."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_starts(sorted_R, middle)) <= num_micro_batches else (middle + 1, high)
    return low


def micro_batches_of(rank: int, world_size: int, num_micro_batches: int) -> range:
    """The micro-batches of `rank`: balanced contiguous blocks, the first ranks get one more. May be empty.

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
    """Number of forward passes of every rank: a rank with fewer micro-batches runs the rest on no rows, or peers
    deadlock."""
    _check(world_size, num_micro_batches)
    return -(-num_micro_batches // world_size)


def _check(world_size: int, num_micro_batches: int) -> None:
    if world_size < 1 or num_micro_batches < 0:
        raise ValueError(
            f"{num_micro_batches} micro-batches over {world_size} ranks: "
            "needs at least 1 rank and no fewer than 0 micro-batches"
        )
