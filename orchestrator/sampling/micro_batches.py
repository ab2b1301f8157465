"""Into which slots a step's rows are cut, and which rank runs which of them.

The cut depends on the rows and on the size of a slot, never on who trains; a rank takes a contiguous block of slots,
so that results joined in rank order are in slot order.

Shape legend: R = rows of a step, S = slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SlotSize:
    """How much a slot (micro-batch) may be. One of `rows` and `tokens` is 0, which says nothing; both: the job's own.

    Args:
        rows: rows of it, however long.
        tokens: what its rows take when all are padded to the longest. A row that is longer is a slot by itself.
        multiple: of `tokens`: there are so many slots, or a multiple of that, where there are as many rows. Where the
            size is found by measuring, workers get equally many.
    """

    rows: int = 0
    tokens: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens) < 0 or (self.rows and self.tokens) or self.multiple < 1:
            raise ValueError(f"{self} is no size of a slot: it is of rows or of tokens, and at least 1")

    def __bool__(self) -> bool:
        return bool(self.rows or self.tokens)


UNSAID = SlotSize()
ONE_ROW = SlotSize(rows=1)


def cut_into_slots(lengths_R: Ints, size: SlotSize) -> list[Ints]:
    """[S] row numbers of each slot; all rows once.

    Slots of so many rows hold them in their order. Slots of so many tokens hold rows of like length and are about
    equally full: a bucket's padding is what its longest row has over the others, so rows that lie next to each other in
    order of length waste least. Long rows take more time for each token, so slots are in an order in which any run of
    them has about as many long ones as another. Rows of equal length keep their order.

    Raises:
        ValueError: a size that says nothing.
    """
    if not size:
        raise ValueError(f"{size} doesn't say how much a slot may be")
    if not len(lengths_R):
        return []
    if size.rows:
        return np.split(np.arange(len(lengths_R)), range(size.rows, len(lengths_R), size.rows))
    by_length_R = np.argsort(-lengths_R, kind="stable")
    sorted_R = lengths_R[by_length_R]
    num_slots = len(_starts(sorted_R, size.tokens))
    wanted = min(-(-num_slots // size.multiple) * size.multiple, len(lengths_R))
    starts = _starts(sorted_R, _least_tokens(sorted_R, size.tokens, wanted))
    slots = np.split(by_length_R, starts[1:])
    return slots if sorted_R[0] == sorted_R[-1] else [slots[number] for number in spread(len(slots))]


def spread(count: int) -> list[int]:
    """The numbers below `count` by their bits in reverse, as van der Corput's sequence has them: those that follow one
    another are far apart, and every run of them is spread over all."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


def padded_tokens(lengths_R: Ints, slots: Sequence[Ints]) -> Ints:
    """[S] tokens of each slot when its rows are as long as its longest."""
    return np.array([lengths_R[rows].max(initial=0) * len(rows) for rows in slots], dtype=np.int64)


def _starts(sorted_R: Ints, tokens: int) -> list[int]:
    """Where slots of at most so many tokens begin, each as full as it gets: as few as there can be, as every slot ends
    with the shortest row that it could have."""
    starts, end = [], 0
    while end < len(sorted_R):
        starts.append(end)
        end += max(1, tokens // int(sorted_R[end]))
    return starts


def _least_tokens(sorted_R: Ints, tokens: int, num_slots: int) -> int:
    """The smallest size of slots, up to `tokens`, that takes no more than `num_slots`: with it they are about equally
    full."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_starts(sorted_R, middle)) <= num_slots else (middle + 1, high)
    return low


def slots_of(rank: int, world_size: int, num_slots: int) -> range:
    """The slots of `rank`: balanced contiguous blocks, the first ranks have one more. May be empty.

    Raises:
        ValueError: a rank outside the world, an empty world, or a negative number of slots.
    """
    _check(world_size, num_slots)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}; ranks run from 0 to {world_size - 1}")
    share, extra = divmod(num_slots, world_size)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def max_slots(world_size: int, num_slots: int) -> int:
    """Forward passes that every rank runs: a rank with fewer slots runs the rest with no rows, or peers deadlock."""
    _check(world_size, num_slots)
    return -(-num_slots // world_size)


def _check(world_size: int, num_slots: int) -> None:
    if world_size < 1 or num_slots < 0:
        raise ValueError(f"{num_slots} slots over {world_size} ranks: needs at least 1 rank and no fewer than 0 slots")
