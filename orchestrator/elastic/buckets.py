"""Buckets: runs of parameters whose gradients are summed over the ranks together.

Pure: engine and layout cut alike. A bucket is a group of ZeRO, so a rank's part of it is the bucket's n-th piece, and a
reduce-scatter of the bucket gives each rank just what it updates.
"""

from collections.abc import Sequence

UNDER_WAY = 4  # buckets that travel at once: enough for a link never to idle, and it bounds the memory


def capacity(bucket_mb: float) -> int:
    """Elements of a bucket, at most."""
    return max(1, int(bucket_mb * 2**20) // 4)


def buckets(numel: Sequence[int], capacity: int) -> list[list[int]]:
    """Indexes of parameters, cut from the end into runs of at most `capacity` elements; a larger parameter has one of
    its own. Backward passes reach the last parameters first: so the first bucket is the first to be complete, and
    within a bucket the order is the model's.
    """
    cut: list[list[int]] = []
    room = 0
    for index in reversed(range(len(numel))):
        if not cut or numel[index] > room:
            cut.append([])
            room = capacity
        cut[-1].append(index)
        room -= numel[index]
    return [bucket[::-1] for bucket in cut]
