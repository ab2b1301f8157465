"""Partition of parameters into buckets, whose gradients are summed over the ranks together.

Pure: engine and layout use the same partition. A bucket is a group of ZeRO: a rank owns the bucket's n-th piece, and a
reduce-scatter of the bucket gives each rank exactly what it updates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.spec.communication import BLOCK, CommunicationSpec

UNDER_WAY = 4  # buckets in flight: enough to keep a link busy, few enough to bound the memory
MANY_RANKS = 64

# Elements: every piece is a multiple of it. On a CPU, torch's fused AdamW processes this many at once, 64 bytes, and
# the remainder of a piece one by one, with different rounding: with no remainder, an element's update doesn't depend on
# its position in a piece.
PIECE_MULTIPLE = 16


def piece_multiple(compressed: bool) -> int:
    """The number of elements that each piece of a bucket is a multiple of: whole blocks if it is compressed."""
    return BLOCK if compressed else PIECE_MULTIPLE


@dataclass(frozen=True)
class BucketCut:
    """Places of parameters in a bucket, which is divided into one piece per rank.

    Args:
        members: indexes of the parameters, in the order in which they lie in memory.
        starts: the element of the bucket at which each begins. What lies between them and after the last one is filler.
        piece: elements of a piece.
    """

    members: tuple[int, ...]
    starts: tuple[int, ...]
    piece: int


def cut_buckets(
    numel: Sequence[int], num_ranks: int, communication: CommunicationSpec, compressed: bool, is_whole: bool
) -> list[BucketCut]:
    """Parameters on the same ranks, grouped from the end into runs of at most a bucket's size; a larger parameter gets
    its own bucket. Backward passes reach the last parameters first, so the first bucket is the first to be complete.

    Args:
        numel: of each parameter, in the model's order.
        compressed: gradients are sent compressed.
        is_whole: each parameter lies in one piece. Pieces are as long as the largest then, so that one is the size of
            a piece, and buckets are larger by the number of ranks.
    """
    size = capacity(communication, num_ranks)
    if is_whole:
        size = max(size, max(numel, default=0)) * num_ranks
    multiple = piece_multiple(compressed)
    return [
        _dealt(bucket, numel, num_ranks, multiple) if is_whole else _laid_out(bucket, numel, num_ranks, multiple)
        for bucket in _runs(numel, size)
    ]


def _runs(numel: Sequence[int], size: int) -> list[list[int]]:
    """Indexes, the last ones first, each run ascending."""
    runs: list[list[int]] = []
    room = 0
    for index in reversed(range(len(numel))):
        if not runs or numel[index] > room:
            runs.append([])
            room = size
        runs[-1].append(index)
        room -= numel[index]
    return [run[::-1] for run in runs]


def _laid_out(bucket: Sequence[int], numel: Sequence[int], num_ranks: int, multiple: int) -> BucketCut:
    """End to end, in the model's order."""
    starts, end = _ends((numel[index] for index in bucket), 0)
    return BucketCut(tuple(bucket), starts, _multiple_of(multiple, -(-end // num_ranks)))


def _dealt(bucket: Sequence[int], numel: Sequence[int], num_ranks: int, multiple: int) -> BucketCut:
    """The largest first, each to the rank that has least."""
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    held = [0] * num_ranks
    for index in sorted(bucket, key=lambda index: (-numel[index], index)):
        rank = held.index(min(held))
        dealt[rank].append(index)
        held[rank] += numel[index]
    piece = _multiple_of(multiple, max(held))
    starts: list[int] = []
    for rank, mine in enumerate(dealt):
        mine.sort()
        starts += _ends((numel[index] for index in mine), rank * piece)[0]
    return BucketCut(tuple(index for mine in dealt for index in mine), tuple(starts), piece)


def _ends(numel: Iterable[int], begin: int) -> tuple[tuple[int, ...], int]:
    """Where parameters begin that lie end to end from `begin` on, and the end of the last one."""
    starts = []
    for length in numel:
        starts.append(begin)
        begin += length
    return tuple(starts), begin


def _multiple_of(multiple: int, numel: int) -> int:
    return -(-numel // multiple) * multiple


def capacity(communication: CommunicationSpec, num_ranks: int) -> int:
    """Largest number of elements of a bucket, unless one parameter is larger. Exceeds the job's setting on very many
    ranks, as in Megatron, where pieces would become too small."""
    return max(1, int(communication.bucket_mb * 2**20) // 4) * max(1, num_ranks // MANY_RANKS)
