"""Whether a cluster has room for workers that are all alike.

Ray gives a worker a part of one GPU only, but tells how much of a node's GPUs is free for all of them together. So
parts that are free are counted as if they lay on as few GPUs as possible; and what is taken, where it is as much as
some workers of this kind would take, as if they had taken it. On a node where all are alike that is so.
"""

import math
from collections.abc import Mapping, Sequence

DEVICES = "GPU devices"  # beside Ray's own names: how many GPUs a node has, if that is known
EPSILON = 1e-9


def places(free: Sequence[Mapping[str, float]], request: Mapping[str, float]) -> int:
    """How many workers of `request` fit, given what is free on each node."""
    wanted = {name: amount for name, amount in request.items() if amount > 0}
    return sum(min(_fit(node, name, amount) for name, amount in wanted.items()) for node in free)


def _fit(node: Mapping[str, float], name: str, amount: float) -> int:
    available = node.get(name, 0.0)
    if name != "GPU" or amount >= 1:
        return int(available / amount + EPSILON)
    whole = int(available + EPSILON)
    on_each, on_the_rest = int(1 / amount + EPSILON), int((available - whole) / amount + EPSILON)
    together, devices = whole * on_each + on_the_rest, node.get(DEVICES, available)
    taken = (devices - available) / amount
    is_alike = devices > available and abs(taken - round(taken)) < 1e-6
    return max(0, min(together, int(devices) * on_each - round(taken))) if is_alike else together


def threads_of(cores: Sequence[int], workers: int) -> int:
    """Threads for each of so many workers that are spread evenly over nodes with so many cores: of the smallest node
    its share, at least one."""
    least = min((number for number in cores if number > 0), default=1)
    nodes = max(1, sum(number > 0 for number in cores))
    return max(1, least // math.ceil(workers / nodes))


def fits(node: Mapping[str, float], request: Mapping[str, float]) -> bool:
    """Whether a worker of `request` fits, given what is free on a node."""
    return all(_fit(node, name, amount) > 0 for name, amount in request.items() if amount > 0)
