"""Partition of parameters into buckets, whose gradients are summed over the ranks together.

Pure: engine and layout use the same partition. A bucket is a group of ZeRO: a rank owns the bucket's n-th piece, and a
reduce-scatter of the bucket gives each rank exactly what it updates.
"""

from collections.abc import Sequence

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


def buckets(numel: Sequence[int], num_ranks: int, communication: CommunicationSpec) -> list[list[int]]:
    """Indexes of parameters, grouped from the end into runs of at most a bucket's size; a larger parameter gets its own
    bucket. Backward passes reach the last parameters first, so the first bucket is the first to be complete; within a
    bucket the order is the model's.
    """
    cut: list[list[int]] = []
    room = 0
    for index in reversed(range(len(numel))):
        if not cut or numel[index] > room:
            cut.append([])
            room = capacity(communication, num_ranks)
        cut[-1].append(index)
        room -= numel[index]
    return [bucket[::-1] for bucket in cut]


def capacity(communication: CommunicationSpec, num_ranks: int) -> int:
    """Largest number of elements of a bucket, unless one parameter is larger. Exceeds the job's setting on very many
    ranks, as in Megatron, where pieces would become too small."""
    return max(1, int(communication.bucket_mb * 2**20) // 4) * max(1, num_ranks // MANY_RANKS)
