"""How many collectives this process's training thread has entered.

All ranks of a generation enter the same collectives in the same order. If one hangs outside of them (in a user's code,
in a driver), the others wait in the next one: its number is the lowest, and that tells who it is.
"""

_entered = 0


def enter() -> None:
    """Called before each collective that every rank calls equally often. By the training thread only."""
    global _entered
    _entered += 1


def reset() -> None:
    """A new generation counts from zero."""
    global _entered
    _entered = 0


def entered() -> int:
    """From any thread."""
    return _entered
