"""Checkpoints of a run as its controller completes them, and deletes those that aren't kept."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.manifest import checkpoint_name, manifest_of, parse_checkpoint_name
from orchestrator.checkpoint.retention import best_checkpoints, discard, discard_unnamed
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.errors import CheckpointCorrupt
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.events.training import CheckpointCommitted
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords
from orchestrator.run_records.checkpoints.search import (
    DIRECTORY,
    check_mounted,
    list_checkpoints,
    newest_good,
    path_of,
)
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.storage.backends.location import Location, is_there, objects_at
from orchestrator.storage.reserve import RESERVE_BYTES

log = logging.getLogger("orchestrator.control")


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
        check_mounted(run_dir)
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
        check_mounted(run_dir)
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
