"""Checkpoints of a run as its controller and its readers handle them: completion, retention and search.

The journal names the complete ones (`orchestrator.run_records.checkpoint_records`); their files are in run storage.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.block_digests import drop_cached
from orchestrator.checkpoint.manifest import MANIFEST_FILE, checkpoint_name, manifest_of, parse_checkpoint_name
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.retention import best_checkpoints, discard, discard_unnamed
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.errors import CheckpointCorrupt, NotFound, OrchestratorError
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.protocol.messages import Restore
from orchestrator.run_records.checkpoint_records import CheckpointRecord, CheckpointRecords
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.storage.backends.location import Location, is_there, objects_at
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.chain_reader import has_journal
from orchestrator.storage.reserve import RESERVE_BYTES

log = logging.getLogger("orchestrator.control")

DIRECTORY = "checkpoints"  # in the run's directory
LOOK_AGAIN_S = 2.0  # until checkpoints that couldn't be read are tried again

# A file that is missing, or is something else, means a broken checkpoint. Any other error of the operating system means
# that storage is unreachable: the checkpoint may be good.
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def path_of(run_dir: Location, record: CheckpointRecord) -> Location:
    """The checkpoint's location."""
    return run_dir / DIRECTORY / record.name


# -- Completion and retention ------------------------------------------------------------------------------------------


def commit_checkpoint(run_id: str, run_dir: Location, action: Commit) -> CheckpointCommitted:
    """Write the checkpoint's manifest. A repeat is harmless. The checkpoint is complete once the event is journalled.

    Shapes are those in the workers' `meta["shapes"]`; a tensor that is not listed there is flat.

    Raises:
        CheckpointCorrupt: the shards don't cover every tensor, or a file differs from what its rank wrote.
        OSError: run storage can't be read or written.
    """
    try:
        return _committed(run_id, run_dir, action)
    except CheckpointCorrupt:
        _check_mounted(run_dir)
        raise


def _committed(run_id: str, run_dir: Location, action: Commit) -> CheckpointCommitted:
    shards = read_shards(run_dir / DIRECTORY, action.shards, term=action.term)
    shapes: dict[str, tuple[int, ...]] = {}
    for _, header in shards:
        for name, part in header.parts:
            shapes[name] = (max(part.stop, *shapes.get(name, (0,))),)
    listed: Any = next((header.meta for _, header in shards if header.meta is not None), {}).get("shapes", {})
    shapes |= {name: tuple(shape) for name, shape in listed.items() if name in shapes}
    manifest = manifest_of(shards, run_id=run_id, term=action.term, shapes=shapes)
    path = commit(run_dir / DIRECTORY, manifest)
    return CheckpointCommitted(action.step, str(path), action.generation, manifest.digest)


def superfluous(
    run_dir: Location, records: CheckpointRecords, keep: CheckpointSpec, validations: Sequence[tuple[int, float]]
) -> tuple[int, ...]:
    """Steps of the checkpoints that the job doesn't keep, and of those before the newest one that were removed by hand.
    Raises OSError."""
    there = [record.step for record in list_checkpoints(run_dir, records)]
    gone = [record.step for record in records.current[:-1] if record.step not in there]
    if gone:
        _check_mounted(run_dir)
    best = best_checkpoints(there, validations, keep.keep_best)
    old = there[: -keep.keep_last] if keep.keep_last is not None else []
    return tuple(sorted({*gone, *(step for step in old if step not in best)}))


def discard_garbage(run_dir: Location, records: CheckpointRecords) -> None:
    """Delete what the journal doesn't name and what can't be completed any more: it was abandoned, or is of writers
    before the newest checkpoint. What the journal names stays, even where nothing is to be seen of its manifest. What
    can't be deleted is tried again after the next checkpoint.
    """

    def is_needed(step: int, term: int, generation: int) -> bool:
        return not _is_garbage(records, step, term, generation)

    try:
        deleted = discard_unnamed(run_dir / DIRECTORY, records.names, is_needed)
    except OSError as error:
        log.warning("an old checkpoint could not be deleted: %s", error)
        return
    if deleted:
        log.info("deleted %s", ", ".join(path.name for path in deleted))


def _is_garbage(records: CheckpointRecords, step: int, term: int, generation: int) -> bool:
    name = checkpoint_name(step, term, generation)
    is_old = bool(records.current) and (term, generation, step) < _age(records.current[-1].name)
    return name not in records.names and (is_old or name in records.abandoned)


def _age(name: str) -> tuple[int, int, int]:
    """(term, generation, step) of a checkpoint."""
    step, term, generation = parse_checkpoint_name(name) or (-1, -1, -1)
    return term, generation, step


def hopeless(
    run_dir: Location, records: CheckpointRecords, can_complete: Callable[[int, int, int], bool]
) -> tuple[str, ...]:
    """Names of the checkpoints in run storage that are neither complete nor garbage, and that can't be completed any
    more, by step, term and generation. Another controller may know better, so they become garbage by an event of the
    journal, which only its newest controller can write. Raises OSError."""
    found = []
    for name in objects_at(run_dir).names(DIRECTORY):
        writers = parse_checkpoint_name(name)
        is_unfinished = writers is not None and name not in records.names
        if writers and is_unfinished and not _is_garbage(records, *writers) and not can_complete(*writers):
            found.append(name)
    return tuple(sorted(found))


def drop_set_aside(run_dir: Location, records: CheckpointRecords) -> None:
    """Delete checkpoints that were set aside, the oldest first, until another one like the newest one fits: none
    without a good one.

    Raises:
        OSError: run storage can't be read, or something can't be deleted.
    """
    if not isinstance(run_dir, Path):
        return  # a bucket has room
    aside = [path for record in records.set_aside if is_there(path := path_of(run_dir, record))]
    current = list_checkpoints(run_dir, records) if aside else ()
    if not current:
        return
    newest = objects_at(path_of(run_dir, current[-1])).objects("")
    needed = RESERVE_BYTES + sum(file.num_bytes for file in newest)
    if shutil.disk_usage(run_dir).free >= needed or newest_good(run_dir, records) is None:  # the latter reads much
        return
    for path in aside:
        if shutil.disk_usage(run_dir).free >= needed:
            return
        log.info("deleting %s, of steps that were given up: the disk is full", path)
        discard(path)


# -- Search ------------------------------------------------------------------------------------------------------------


def list_checkpoints(run_dir: Location, records: CheckpointRecords) -> tuple[CheckpointRecord, ...]:
    """The complete checkpoints that weren't removed by hand, oldest first. No file is read. Raises OSError."""
    return tuple(record for record in records.current if _has_manifest(path_of(run_dir, record)))


def _check_mounted(run_dir: Location) -> None:
    """Raise OSError if nothing of the run is to be seen: where its file system isn't mounted, all its files seem to be
    deleted. Called after something was missing."""
    if not has_journal(objects_at(run_dir)):
        raise OSError(
            errno.ENODEV, "the run's journal is not there: perhaps its file system is not mounted", str(run_dir)
        )


def _has_manifest(path: Location) -> bool:
    return MANIFEST_FILE in objects_at(path).names("")


def choose(run_dir: Location, records: CheckpointRecords, step: int | None = None) -> Location | None:
    """The checkpoint to resume from, with verified digests: that of `step`, or the newest. None without checkpoints.

    Raises:
        NotFound: there is none of `step`; the message lists the steps with one.
        CheckpointCorrupt: its files were changed; the message names the previous good checkpoint.
    """
    found = list_checkpoints(run_dir, records)
    wanted = found if step is None else tuple(record for record in found if record.step == step)
    if step is not None and not wanted:
        steps = ", ".join(str(record.step) for record in found) or "none"
        raise NotFound(
            f"{run_dir / DIRECTORY} holds no checkpoint of step {step}; it holds {steps}",
            remedy="Name one of these steps, or none for the newest.",
            unchanged="Nothing was started.",
        )
    if not wanted:
        return None
    chosen = wanted[-1]
    try:
        _verify(run_dir, chosen)
    except CheckpointCorrupt as error:
        earlier = [record for record in reversed(found) if record.step < chosen.step]
        good = next((record for record in earlier if _is_good(run_dir, record)), None)
        offer = f"newest good checkpoint before it is {path_of(run_dir, good)}" if good else ""
        remedy = error.remedy or (f"The {offer}" if offer else "There is no good checkpoint before it")
        raise CheckpointCorrupt(error.message, remedy=remedy, unchanged="Nothing was deleted.") from error
    return path_of(run_dir, chosen)


def _verify(run_dir: Location, record: CheckpointRecord) -> None:
    """Raises CheckpointCorrupt if a file differs from what was written, OSError if it can't be read."""
    with CheckpointReader(path_of(run_dir, record), record.sha256) as reader:
        reader.verify()


def _is_good(run_dir: Location, record: CheckpointRecord) -> bool:
    try:
        _verify(run_dir, record)
    except CheckpointCorrupt:
        return False
    return True


def newest_good(run_dir: Location, records: CheckpointRecords) -> Restore | None:
    """The newest complete checkpoint with correct digests; bad ones are logged and skipped. None if there was none, or
    all were removed by hand.

    Raises:
        OSError: one can't be read now, and may be good; or none is good, and some are still there.
    """
    bad: OrchestratorError | OSError | None = None
    for record in reversed(records.current):
        path = path_of(run_dir, record)
        fault = _fault_of(run_dir, record)
        if fault is None:
            return Restore(record.step, str(path), digest=record.sha256)
        log.error("%s can't be restored: %s", path, fault)
        bad = bad or (fault if _has_manifest(path) else None)
    if records.current:
        _check_mounted(run_dir)
    if bad is not None:
        raise OSError(errno.EIO, f"none is good: {bad}", str(run_dir / DIRECTORY))
    return None


def _fault_of(run_dir: Location, record: CheckpointRecord) -> OrchestratorError | OSError | None:
    """Why a checkpoint can't be restored; None if it can. What seems to be wrong is read twice: a bit may flip on its
    way here. Raises OSError if it can't be read now, and may be good."""
    fault: OrchestratorError | OSError | None = None
    for attempt in range(2):
        if attempt > 0:
            _drop_cached(path_of(run_dir, record))
        try:
            _verify(run_dir, record)
        except (OrchestratorError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in BROKEN:
                raise
            fault = error
        else:
            return None
    return fault


def _drop_cached(path: Location) -> None:
    """Have the next reads of a directory's files reach the device."""
    if isinstance(path, Path):
        for file in path.glob("*"):
            with suppress(OSError):
                drop_cached(file)


class CheckpointFinder:
    """Finds the checkpoint that a run may restore, which is unknown while run storage can't be read.

    Args:
        caller: makes the calls to run storage.
    """

    def __init__(self, run_dir: Location, caller: Caller = call_here) -> None:
        self._run_dir, self._caller = run_dir, caller
        self._looked_s = 0.0
        self.trouble = ""  # why it is unknown now

    def newest_good(self, now_s: float, records: CheckpointRecords) -> Restore | None:
        """The newest good one of these checkpoints; None if there is none, or while there is `trouble`, which is
        rechecked at intervals."""
        if self.trouble and now_s - self._looked_s < LOOK_AGAIN_S:
            return None
        self._looked_s, before = now_s, self.trouble
        try:
            found = self._caller(newest_good, self._run_dir, records)
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
