"""Checkpoints of a run in run storage: the complete ones, the newest good one, and the one that a user asks for.

The journal names the complete ones (`orchestrator.run_records.checkpoints.checkpoint_records`). Ranks verify what they
read of a checkpoint, so a controller first offers them the newest one whose files are there. Only if a rank finds
damage are checkpoints read whole, to find one without.
"""

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.checkpoint.block_digests import drop_cached
from orchestrator.checkpoint.manifest import MANIFEST_FILE
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.errors import CheckpointCorrupt, NotFound, OrchestratorError
from orchestrator.protocol.messages import Restore
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecord, CheckpointRecords
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.caller import Caller, call_here
from orchestrator.storage.chain_reader import has_journal

log = logging.getLogger("orchestrator.control")

DIRECTORY = "checkpoints"  # in the run's directory
LOOK_AGAIN_S = 2.0  # until checkpoints that couldn't be read are tried again

# A file that is missing, or is something else, means a broken checkpoint. Any other error of the operating system means
# that storage is unreachable: the checkpoint may be good.
BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def path_of(run_dir: Location, record: CheckpointRecord) -> Location:
    """The checkpoint's location."""
    return run_dir / DIRECTORY / record.name


def list_checkpoints(run_dir: Location, records: CheckpointRecords) -> tuple[CheckpointRecord, ...]:
    """The complete checkpoints that weren't removed by hand, oldest first. No file is read. Raises OSError."""
    return tuple(record for record in records.current if _has_manifest(path_of(run_dir, record)))


def check_mounted(run_dir: Location) -> None:
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


def _check_sizes(run_dir: Location, record: CheckpointRecord) -> None:
    """The same by its manifest and the sizes of its files alone."""
    with CheckpointReader(path_of(run_dir, record), record.sha256) as reader:
        reader.check_sizes()


def _is_good(run_dir: Location, record: CheckpointRecord) -> bool:
    try:
        _verify(run_dir, record)
    except CheckpointCorrupt:
        return False
    return True


def newest_good(run_dir: Location, records: CheckpointRecords, reads_files: bool = True) -> Restore | None:
    """The newest complete checkpoint with correct digests; bad ones are logged and skipped. None if there was none, or
    all were removed by hand.

    Args:
        reads_files: False: only sizes are compared, as those who read the files will verify them.

    Raises:
        OSError: one can't be read now, and may be good; or none is good, and some are still there.
    """
    bad: OrchestratorError | OSError | None = None
    for record in reversed(records.current):
        path = path_of(run_dir, record)
        fault = _fault_of(run_dir, record, _verify if reads_files else _check_sizes)
        if fault is None:
            return Restore(record.step, str(path), digest=record.sha256)
        log.error("%s can't be restored: %s", path, fault)
        bad = bad or (fault if _has_manifest(path) else None)
    if records.current:
        check_mounted(run_dir)
    if bad is not None:
        raise OSError(errno.EIO, f"none is good: {bad}", str(run_dir / DIRECTORY))
    return None


def _fault_of(
    run_dir: Location, record: CheckpointRecord, check: Callable[[Location, CheckpointRecord], None]
) -> OrchestratorError | OSError | None:
    """Why a checkpoint can't be restored; None if it can. What seems to be wrong is read twice: a bit may flip on its
    way here. Raises OSError if it can't be read now, and may be good."""
    fault: OrchestratorError | OSError | None = None
    for attempt in range(2):
        if attempt > 0:
            _drop_cached(path_of(run_dir, record))
        try:
            check(run_dir, record)
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

    def newest_good(self, now_s: float, records: CheckpointRecords, reads_files: bool = True) -> Restore | None:
        """The newest good one of these checkpoints, as the function finds it; None if there is none, or while there is
        `trouble`, which is rechecked at intervals."""
        if self.trouble and now_s - self._looked_s < LOOK_AGAIN_S:
            return None
        self._looked_s, before = now_s, self.trouble
        try:
            found = self._caller(newest_good, self._run_dir, records, reads_files)
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
