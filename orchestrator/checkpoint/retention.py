"""Selection of the checkpoints to keep by validation loss."""

from collections.abc import Sequence


def best_checkpoints(steps: Sequence[int], validations: Sequence[tuple[int, float]], count: int) -> tuple[int, ...]:
    """The `count` checkpoints with the lowest validation loss; of equal losses, later checkpoints first.

    Args:
        steps: steps of the complete checkpoints, ascending.
        validations: (step, validation loss), ascending. A checkpoint is rated by the newest validation up to its step;
            a checkpoint before the first validation is never among the best.
    """
    rated = []
    for step in steps:
        known = [loss for at, loss in validations if at <= step]
        if known:
            rated.append((known[-1], -step))
    return tuple(-negative for _, negative in sorted(rated)[:count])
