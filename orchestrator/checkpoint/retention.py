"""Selection of the checkpoints to keep by validation loss, and deletion of the others."""

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from orchestrator.checkpoint.manifest import MANIFEST_FILE, parse_checkpoint_name
from orchestrator.storage.atomic import flush
from orchestrator.storage.backends.location import Location, objects_at


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


def discard(checkpoint: Location) -> None:
    """Delete a checkpoint, or what there is of one. The manifest goes first: nothing is read without it."""
    if not isinstance(checkpoint, Path):
        objects = objects_at(checkpoint)
        objects.delete([MANIFEST_FILE])
        objects.delete([found.key for found in objects.objects("")])
        return
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)
    flush(checkpoint)
    shutil.rmtree(checkpoint)


def discard_unnamed(
    checkpoints: Location, named: Collection[str], is_needed: Callable[[int, int, int], bool]
) -> tuple[Location, ...]:
    """Delete checkpoints that are not `named`.

    Args:
        named: by the run's journal.
        is_needed: by step, term and generation, whether it may still be completed.

    Returns:
        those that were deleted.

    Raises:
        OSError: one can't be deleted; all others are, even then.
    """
    deleted, errors = list[Location](), list[OSError]()
    for name in objects_at(checkpoints).names(""):
        writers = parse_checkpoint_name(name)
        if writers is not None and name not in named and not is_needed(*writers):
            try:
                discard(checkpoints / name)
                deleted.append(checkpoints / name)
            except OSError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return tuple(deleted)
