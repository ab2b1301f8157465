"""Link priority in a backward pass: tokens first, gradients while computation needs no link.

Computation waits for tokens, but only the end of the step waits for gradients. A gradient sent as soon as it is ready
competes with the next layer's tokens and delays them, and then the link idles while that layer is computed. So complete
gradients are sent right after tokens have arrived, and at once when no more tokens are to come. Used by the training
thread and, on a GPU, by autograd's own thread for backward passes.
"""

from collections.abc import Callable

_to_come = 0
_listeners: list[Callable[[], None]] = []


def will_return() -> None:
    """Register a transfer of a forward pass: the backward pass will repeat it."""
    global _to_come
    _to_come += 1


def has_returned() -> None:
    """Record that a transfer of a backward pass has arrived, and notify the listeners."""
    global _to_come
    _to_come = max(0, _to_come - 1)
    for listener in _listeners:
        listener()


def to_come() -> int:
    """Transfers that remain in the backward pass."""
    return _to_come


def begin() -> None:
    """Reset the count before a forward pass with gradients: an aborted pass may have left transfers."""
    global _to_come
    _to_come = 0


def listen(listener: Callable[[], None]) -> Callable[[], None]:
    """Call `listener` at every arrival, until the returned function is called."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)
