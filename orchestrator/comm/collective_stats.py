"""What this process's training thread does with its peers: how many collectives it has entered, how long it waited.

All ranks of a generation enter the same collectives in the same order. If one hangs outside of them (in a user's code,
in a driver), the others wait in the next one: its number is the lowest, and that tells who it is. If one is only slow,
the others wait for it at every collective: it is the one that waits least.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

_entered = 0
_waited_s = 0.0


def enter() -> None:
    """Called before each collective that every rank calls equally often. By the training thread only."""
    global _entered
    _entered += 1


@contextmanager
def waiting() -> Iterator[None]:
    """Around whatever ends only when peers have come as far. By the training thread only."""
    global _waited_s
    began_s = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began_s


def reset() -> None:
    """A new generation counts from zero."""
    global _entered, _waited_s
    _entered, _waited_s = 0, 0.0


def entered() -> int:
    """From any thread."""
    return _entered


def waited_s() -> float:
    """All waits of this generation, seconds."""
    return _waited_s
