"""Checkpoints as the controller handles them: the marker that completes the ranks' shards, retention and search."""

import errno
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.manifest import manifest_of, parse_incomplete_name, parse_step_name, step_name
from orchestrator.checkpoint.read import (
    DISCARDED_PREFIX,
    SUPERSEDED_PREFIX,
    CheckpointReader,
    discard,
    list_steps,
    prune,
    set_aside,
)
from orchestrator.checkpoint.retention import best_checkpoints
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.errors import OrchestratorError
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.messages import Restore
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.reserve import RESERVE_BYTES

log = logging.getLogger("orchestrator.control")

DIRECTORY = "checkpoints"  # in the run's directory
LOOK_AGAIN_S = 2.0  # until checkpoints that couldn't be read are tried again

# A file that is missing, or is something else, means a broken checkpoint. Any other error of the operating system means
# that storage is unreachable: the checkpoint may be good.
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def commit_checkpoint(run_id: str, run_dir: Path, term: int, action: Commit) -> Path:
    """Mark the checkpoint complete under the controller's `term`. A repeat is harmless.

    Shapes are those in the workers' `meta["shapes"]`; a tensor that is not listed there is flat.

    Raises:
        CheckpointCorrupt: the shards don't cover every tensor, or a file differs from what its rank wrote.
    """
    shards = read_shards(run_dir / DIRECTORY, action.shards, term=action.term)
    shapes: dict[str, tuple[int, ...]] = {}
    for _, header in shards:
        for name, part in header.parts:
            shapes[name] = (max(part.stop, *shapes.get(name, (0,))),)
    listed: Any = next((header.meta for _, header in shards if header.meta is not None), {}).get("shapes", {})
    shapes |= {name: tuple(shape) for name, shape in listed.items() if name in shapes}
    manifest = manifest_of(shards, run_id=run_id, term=action.term, shapes=shapes)
    return commit(run_dir / DIRECTORY, manifest, term=term)


def drop_old_checkpoints(
    run_dir: Path, keep: CheckpointSpec, validations: Sequence[tuple[int, float]]
) -> tuple[int, ...]:
    """Delete checkpoints that the job doesn't keep. Failed deletions are retried after the next checkpoint.

    Returns:
        the steps of the deleted ones.
    """
    if keep.keep_last is None:
        return ()
    checkpoints = run_dir / DIRECTORY
    try:
        best = best_checkpoints(list_steps(checkpoints), validations, keep.keep_best)
        dropped = prune(checkpoints, keep.keep_last, best)
    except OSError as error:
        log.warning("an old checkpoint could not be deleted: %s", error)
        return ()
    if dropped:
        log.info("deleted %s", ", ".join(path.name for path in dropped))
    return tuple(step for path in dropped if (step := parse_step_name(path.name)) is not None)


def discard_unfinished(run_dir: Path, term: int, can_complete: Callable[[int, int, int], bool]) -> None:
    """Delete parts of checkpoints that can't be completed any more, by step, term and generation, and what interrupted
    deletions have left. What can't be deleted stays, and what is of a later term than the controller's `term`."""
    checkpoints = run_dir / DIRECTORY
    for path in tuple(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        unfinished = parse_incomplete_name(path.name)
        if path.name.startswith(DISCARDED_PREFIX) or (
            unfinished is not None and unfinished[1] <= term and not can_complete(*unfinished)
        ):
            log.info("deleting %s, which can't be completed any more", path)
            shutil.rmtree(path, ignore_errors=True)


def drop_superseded(run_dir: Path) -> None:
    """Delete checkpoints that were set aside, the oldest first, until another one like the newest one fits: none
    without a good one.

    Raises:
        OSError: run storage can't be read, or something can't be deleted.
    """
    checkpoints = run_dir / DIRECTORY
    there = tuple(checkpoints.iterdir()) if checkpoints.is_dir() else ()
    hidden = sorted(path for path in there if path.name.startswith(SUPERSEDED_PREFIX))
    steps = list_steps(checkpoints) if hidden else ()
    if not steps:
        return
    newest = (checkpoints / step_name(steps[-1])).iterdir()
    needed = RESERVE_BYTES + sum(path.stat().st_size for path in newest)
    if shutil.disk_usage(checkpoints).free >= needed or newest_good(run_dir) is None:  # the latter reads much
        return
    for path in hidden:
        if shutil.disk_usage(checkpoints).free >= needed:
            return
        log.info("deleting %s, of steps that were given up: the disk is full", path)
        discard(path)


class CheckpointFinder:
    """Finds the checkpoint that a run may restore, which is unknown while run storage can't be read.

    Args:
        caller: makes the calls to run storage.
    """

    def __init__(self, run_dir: Path, caller: Caller = call_here) -> None:
        self._run_dir, self._caller = run_dir, caller
        self._looked_s = 0.0
        self.trouble = ""  # why it is unknown now

    def newest_good(self, now_s: float) -> Restore | None:
        """The newest good checkpoint; None if there is none, or while there is `trouble`, which is rechecked at
        intervals."""
        if self.trouble and now_s - self._looked_s < LOOK_AGAIN_S:
            return None
        self._looked_s, before = now_s, self.trouble
        try:
            found = self._caller(newest_good, self._run_dir)
        except OSError as error:
            where = error.filename or self._run_dir
            self.trouble = (
                f"checkpoints can't be read: {error.strerror or error}: {where}; the run waits until they can: repair "
                "the storage, or remove the checkpoint to go back to the one before"
            )
            if self.trouble != before:
                log.error(self.trouble)
            return None
        self.trouble = ""
        return found


def newest_good(run_dir: Path) -> Restore | None:
    """The newest complete checkpoint with correct digests; bad ones are logged and skipped.

    Raises:
        OSError: one can't be read now, and may be good.
    """
    checkpoints = run_dir / DIRECTORY
    for step in reversed(list_steps(checkpoints)):
        path = checkpoints / step_name(step)
        try:
            with CheckpointReader(path) as reader:
                reader.verify()
        except (OrchestratorError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in BROKEN:
                raise
            log.error("%s can't be restored: %s", path, error)
            continue
        return Restore(step, str(path))
    return None


def leave_behind(run_dir: Path, after_step: int, term: int, generation: int) -> None:
    """Hide the checkpoints after `after_step`, from which the run continues with `generation`: their steps were
    discarded."""
    mark = f"{term:06d}-{generation:06d}"
    for path in set_aside(run_dir / DIRECTORY, after_step, mark, before=(term, generation)):
        log.info("a checkpoint after the step that the run continues from is kept as %s", path)
