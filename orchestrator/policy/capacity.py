"""Whether a cluster has room for workers that are all alike."""

from collections.abc import Mapping, Sequence


def places(free: Sequence[Mapping[str, float]], request: Mapping[str, float]) -> int:
    """How many workers of `request` fit, given what is free on each node."""
    wanted = {name: amount for name, amount in request.items() if amount > 0}
    return sum(int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in wanted.items())) for node in free)
