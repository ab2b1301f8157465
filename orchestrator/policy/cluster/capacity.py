"""Capacity of a cluster for workers with equal requests.

Ray gives a worker a fraction of one GPU only, but reports the free amount of a node's GPUs as one sum. So free
fractions are counted as if they lay on as few GPUs as possible. A used amount that is a multiple of the request is
counted as if workers of this kind had taken it, which is exact on a node where all workers are alike.
"""

import math
from collections.abc import Mapping, Sequence

DEVICES = "GPU devices"  # not a name of Ray's: number of GPUs of a node, if known
EPSILON = 1e-9


def places(free: Sequence[Mapping[str, float]], request: Mapping[str, float]) -> int:
    """Number of workers of `request` that fit the free resources of each node."""
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
    """Threads per worker, with `workers` spread evenly over nodes of `cores`: its share of the smallest node, at least
    one."""
    least = min((number for number in cores if number > 0), default=1)
    nodes = max(1, sum(number > 0 for number in cores))
    return max(1, least // math.ceil(workers / nodes))


def fits(node: Mapping[str, float], request: Mapping[str, float]) -> bool:
    """Whether a worker of `request` fits the free resources of a node."""
    return all(_fit(node, name, amount) > 0 for name, amount in request.items() if amount > 0)
