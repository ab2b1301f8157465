"""The controller's part of checkpoints: the marker that makes the ranks' shards one, and which of them are kept."""

import errno
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from orchestrator.checkpoint.manifest import manifest_of, parse_step_name, step_name
from orchestrator.checkpoint.read import CheckpointReader, list_steps, prune, set_aside
from orchestrator.checkpoint.retention import best_checkpoints
from orchestrator.checkpoint.write import commit
from orchestrator.errors import OrchestratorError
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.messages import Restore
from orchestrator.spec.job import CheckpointSpec

log = logging.getLogger("orchestrator.control")

DIRECTORY = "checkpoints"  # in the run's directory
LOOK_AGAIN_S = 2.0  # at what couldn't be read

# A file that isn't there, or is something else, is a broken checkpoint. All else that an operating system may say is of
# storage that is out of reach: what lies there may be good.
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def commit_checkpoint(run_id: str, run_dir: Path, term: int, action: Commit) -> Path:
    """Mark the checkpoint complete, in the name of the controller's `term`. A repeat is harmless.

    Shapes are what the workers say in `meta["shapes"]`; a tensor that they don't mention is flat.

    Raises:
        CheckpointCorrupt: the shards don't cover every tensor, or a file is not what its rank wrote.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in action.shards:
        for name, _, _, stop in shard.entries:
            shapes[name] = (max(stop, *shapes.get(name, (0,))),)
    told = json.loads(action.shards[0].meta).get("shapes", {})
    shapes |= {name: tuple(shape) for name, shape in told.items() if name in shapes}
    manifest = manifest_of(action.shards, run_id=run_id, term=action.term, shapes=shapes)
    return commit(run_dir / DIRECTORY, manifest, term=term)


def drop_old_checkpoints(
    run_dir: Path, keep: CheckpointSpec, validations: Sequence[tuple[int, float]]
) -> tuple[int, ...]:
    """Delete what the job doesn't keep. What can't be deleted is tried again after the next checkpoint.

    Returns:
        the steps of those that were deleted.
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


class CheckpointFinder:
    """Finds the checkpoint that a run may go back to. While run storage can't be read nobody knows which that is."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._looked_s = 0.0
        self.trouble = ""  # why that can't be said now

    def newest_good(self, now_s: float) -> Restore | None:
        """The newest good one; None where there is none, and while there is `trouble`. That is looked at again after a
        while."""
        if self.trouble and now_s - self._looked_s < LOOK_AGAIN_S:
            return None
        self._looked_s, before = now_s, self.trouble
        try:
            found = newest_good(self._run_dir)
        except OSError as error:
            where = error.filename or self._run_dir
            self.trouble = (
                f"checkpoints can't be read: {error.strerror or error}: {where}; the run waits until they can: mend "
                "the storage, or remove the checkpoint to go back to the one before"
            )
            if self.trouble != before:
                log.error(self.trouble)
            return None
        self.trouble = ""
        return found


def newest_good(run_dir: Path) -> Restore | None:
    """The newest complete checkpoint whose digests are right; worse ones are named in the log and passed over.

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
            log.error("%s can't be gone back to: %s", path, error)
            continue
        return Restore(step, str(path))
    return None


def leave_behind(run_dir: Path, after_step: int, term: int) -> None:
    """The run goes on after `after_step`: later checkpoints belong to a future that didn't come. They are hidden."""
    for path in set_aside(run_dir / DIRECTORY, after_step, f"{term:06d}"):
        log.info("a checkpoint that the run went back from is kept as %s", path)
