"""Which old checkpoints are worth their room."""

from collections.abc import Sequence


def best_checkpoints(steps: Sequence[int], validations: Sequence[tuple[int, float]], count: int) -> tuple[int, ...]:
    """The `count` checkpoints with the lowest validation loss, later ones first where it is equal.

    Args:
        steps: of the complete checkpoints, ascending.
        validations: (step, validation loss), ascending. A checkpoint has the loss of the newest validation up to it;
            one without any is not among the best.
    """
    rated = []
    for step in steps:
        known = [loss for at, loss in validations if at <= step]
        if known:
            rated.append((known[-1], -step))
    return tuple(-negative for _, negative in sorted(rated)[:count])
