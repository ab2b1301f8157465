"""Counters of the training thread's collectives: how many it has entered, and how long it has waited in them.

All ranks of a generation enter the same collectives in the same order. If one rank hangs outside of them (in user code
or in a driver), the others wait in the next one: the hung rank has the lowest count. If a rank is only slow, the others
wait for it at every collective: the slow rank has the shortest wait.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_entered = 0
_waited_s = 0.0


def enter() -> None:
    """Count a collective that every rank calls equally often. Call before it, from the training thread only."""
    global _entered
    _entered += 1


@contextmanager
def waiting() -> Iterator[None]:
    """Time a block that ends only once peers have reached the same point. Training thread only."""
    global _waited_s
    began_s = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began_s


def reset() -> None:
    """Restart the counts for a new generation."""
    global _entered, _waited_s
    _entered, _waited_s = 0, 0.0


def entered() -> int:
    """Collectives entered in this generation. Safe from any thread."""
    return _entered


def waited_s() -> float:
    """Seconds waited in this generation."""
    return _waited_s
