"""Dealing of items (experts or ranks) into bins of equal size: a maximum flow by augmenting paths."""

from collections import Counter, deque
from collections.abc import Sequence


def deal(wanted: Sequence[Sequence[int]], num_bins: int, nodes: Sequence[str] = ()) -> list[int]:
    """Deal items into bins whose sizes differ by at most one, with as many items as possible in a bin that they want,
    and the others where their node has the fewest items.

    Args:
        wanted: per item, the bins it wants; at least `num_bins` items.
        nodes: per item, its node; empty if nodes don't matter.

    Returns:
        The bin of every item.
    """
    size, larger = divmod(len(wanted), num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    unplaced = [item for item in range(len(wanted)) if not _place(item, wanted, bins, size, larger)]
    homes = tuple(nodes) or ("",) * len(wanted)
    there = Counter((homes[item], b) for b, items in enumerate(bins) for item in items)
    for item in sorted(unplaced, key=lambda item: -homes.count(homes[item])):  # full nodes have the least choice
        spare = larger - sum(len(items) > size for items in bins)
        open_bins = [b for b, items in enumerate(bins) if len(items) < size + (spare > 0)]
        b = min(open_bins, key=lambda b: (there[homes[item], b], len(bins[b])))
        bins[b].append(item)
        there[homes[item], b] += 1
    bin_of = [0] * len(wanted)
    for b, items in enumerate(bins):
        for item in items:
            bin_of[item] = b
    return bin_of


def _place(item: int, wanted: Sequence[Sequence[int]], bins: list[list[int]], size: int, larger: int) -> bool:
    """Put `item` into a bin that it wants, moving placed items between bins they want if that makes room.

    One augmenting path of a maximum flow, by breadth-first search. `larger` bins may take `size + 1` items: a bin at
    `size` may also take this right from a bin that uses it, which then has to pass on an item.

    Returns:
        Whether a path was found; if not, `bins` is unchanged.
    """
    spare = larger - sum(len(items) > size for items in bins)
    came_from: dict[int, tuple[int, int]] = {}  # bin -> (bin before it or -1, item that moves here or -1)
    queue: deque[int] = deque()

    def reach(b: int, before: int, moved: int) -> None:
        if b not in came_from:
            came_from[b] = (before, moved)
            queue.append(b)

    for b in wanted[item]:
        reach(b, -1, item)
    while queue:
        b = queue.popleft()
        if len(bins[b]) < size or (len(bins[b]) == size and spare > 0):
            _shift(b, came_from, bins)
            return True
        for placed in bins[b]:
            for other in wanted[placed]:
                reach(other, b, placed)
        if len(bins[b]) == size:
            for other, items in enumerate(bins):
                if len(items) > size:
                    reach(other, b, -1)
    return False


def _shift(end: int, came_from: dict[int, tuple[int, int]], bins: list[list[int]]) -> None:
    """Move every item on the path to `end` one bin on."""
    b = end
    while b >= 0:
        before, moved = came_from[b]
        if moved >= 0:
            bins[b].append(moved)
            if before >= 0:
                bins[before].remove(moved)
        b = before
