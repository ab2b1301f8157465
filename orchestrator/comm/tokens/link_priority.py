"""Whose turn it is on the links in a backward pass: tokens go first, gradients while computation needs no link.

Computation waits for tokens, and only the end of the step for gradients. A gradient that leaves as soon as it is there
meets the next layer's tokens on the link and delays them, and then the link idles while that layer is computed. So
gradients that are complete leave right after tokens have arrived, and without a wait once no more tokens are to come.
By the training thread, and where a GPU has one of its own for backward passes, by that.
"""

from collections.abc import Callable

_to_come = 0
_listeners: list[Callable[[], None]] = []


def will_return() -> None:
    """Called for each transfer of a forward pass: the backward pass has one too."""
    global _to_come
    _to_come += 1


def has_returned() -> None:
    """Called when a transfer of a backward pass has arrived."""
    global _to_come
    _to_come = max(0, _to_come - 1)
    for listener in _listeners:
        listener()


def to_come() -> int:
    """Transfers that the rest of the backward pass has."""
    return _to_come


def begin() -> None:
    """Called before a forward pass whose gradients are wanted: one that was broken off may have left transfers."""
    global _to_come
    _to_come = 0


def listen(listener: Callable[[], None]) -> Callable[[], None]:
    """Have `listener` called at every arrival, until what is returned is called."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
