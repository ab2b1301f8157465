"""Who keeps a copy of whose shard."""

from collections.abc import Sequence


def buddies_of(nodes: Sequence[str]) -> tuple[int, ...]:
    """For each rank the rank that keeps its snapshot, in another failure domain wherever there is one.

    Every rank keeps one other rank's snapshot, so memory and traffic are the same everywhere. Ranks are laid out node
    by node, the fullest node first, and each takes the one that many places on as the fullest node has ranks: never its
    own node, unless that holds more than half of the world. Then as many ranks as possible have a buddy elsewhere.

    Args:
        nodes: by rank, the node (failure domain) that the rank lives on.

    Returns:
        a permutation without fixed points; empty in a world of one, where there is nobody.
    """
    size = len(nodes)
    if size < 2:
        return ()
    count = {node: nodes.count(node) for node in dict.fromkeys(nodes)}
    order = sorted(range(size), key=lambda rank: (-count[nodes[rank]], nodes[rank], rank))
    fullest = max(count.values())
    shift = fullest if 2 * fullest <= size else max(size - fullest, 1)
    buddy = [0] * size
    for place, rank in enumerate(order):
        buddy[rank] = order[(place + shift) % size]
    return tuple(buddy)
