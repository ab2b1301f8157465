"""Counters of the training thread's collectives: how many it has entered, and how long it has waited in them.

All ranks of a generation enter the same collectives in the same order. If one rank hangs outside of them (in user code
or in a driver), the others wait in the next one: the hung rank has the lowest count. If a rank is only slow, the others
wait for it at every collective: the slow rank has the shortest wait.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_entered = 0
_waited_s = 0.0
_on_device: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # beginnings and ends of waits not counted yet


def enter() -> None:
    """Count a collective that every rank calls equally often. Call before it, from the training thread only."""
    global _entered
    _entered += 1


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """Time a block that ends only once peers have reached the same point. Threads of the training only.

    On a GPU the host doesn't wait in it, but the device does: the time is that between two events on its stream.
    """
    global _waited_s
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        try:
            yield
        finally:
            ended.record()
            _on_device.append((began, ended))
        return
    began_s = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began_s


def reset() -> None:
    """Restart the counts for a new generation."""
    global _entered, _waited_s
    _entered, _waited_s = 0, 0.0
    _on_device.clear()


def entered() -> int:
    """Collectives entered in this generation. Safe from any thread."""
    return _entered


def waited_s() -> float:
    """Seconds waited in this generation; on a GPU, those of operations that it has finished."""
    global _waited_s
    while _on_device and _on_device[0][1].query():  # type: ignore[no-untyped-call]
        began, ended = _on_device.popleft()
        _waited_s += began.elapsed_time(ended) / 1000.0
    return _waited_s
