"""Buckets: runs of parameters whose gradients are summed over the ranks together.

Pure: engine and layout cut alike. A bucket is a group of ZeRO, so a rank's part of it is the bucket's n-th piece, and a
reduce-scatter of the bucket gives each rank just what it updates.
"""

from collections.abc import Sequence

from orchestrator.elastic.param_spec import ParamSpec
from orchestrator.spec.communication import BLOCK, CommunicationSpec, CompressionSpec

UNDER_WAY = 4  # buckets that travel at once: enough for a link never to idle, and it bounds the memory
MANY_RANKS = 64
SMALL = 1024  # elements; less isn't worth compressing

# Elements: every piece is a multiple of it. torch's fused AdamW takes as many at once, 64 bytes, on a CPU, and what is
# left over at the end of a piece one by one, with other roundings: so nothing is left over, and an element's update
# doesn't depend on where in a piece it lies.
PIECE_MULTIPLE = 16


def is_compressed(param: ParamSpec, compression: CompressionSpec) -> bool:
    """Whether its gradients are. Norms, biases, routers, small tensors and experts stay as they are."""
    is_large = param.rows > 1 and param.numel >= SMALL
    return compression.is_active and param.expert is None and is_large and ".router." not in f".{param.name}"


def piece_multiple(compressed: bool) -> int:
    """Elements that each piece of a bucket is a multiple of: whole blocks, where it is compressed."""
    return BLOCK if compressed else PIECE_MULTIPLE


def buckets(numel: Sequence[int], num_ranks: int, communication: CommunicationSpec) -> list[list[int]]:
    """Indexes of parameters, cut from the end into runs of at most a bucket's size; a larger parameter has one of its
    own. Backward passes reach the last parameters first: so the first bucket is the first to be complete, and within a
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
    """Elements of a bucket, at most, if a parameter isn't larger. More than the job says over very many ranks, as in
    Megatron: their pieces would get too small."""
    return max(1, int(communication.bucket_mb * 2**20) // 4) * max(1, num_ranks // MANY_RANKS)


def rank_of_product(param: ParamSpec, compression: CompressionSpec) -> int:
    """Columns of the two matrices that PowerSGD sends in place of a parameter's gradient. Each is summed over the
    ranks, which sends it twice."""
    columns = param.numel // param.rows
    return max(1, int(compression.share * param.numel / (2 * (param.rows + columns))))
