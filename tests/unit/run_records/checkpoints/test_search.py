"""Which checkpoint a run goes back to, and when it waits instead."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.checkpoint.manifest import MANIFEST_FILE
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.retention import discard
from orchestrator.policy.state.config import RunLimits
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords
from orchestrator.run_records.checkpoints.search import LOOK_AGAIN_S, CheckpointFinder
from orchestrator.run_records.run_history import RunHistory
from orchestrator.spec.job import JobSpec
from tests.support.call_faults import CallFault, Effect
from tests.support.checkpoints import write_checkpoint
from tests.support.fuse_disk import FuseDisk, drop_cache


def _records(run_dir: Path) -> CheckpointRecords:
    return RunHistory(run_dir, RunLimits.of("r", JobSpec(name="r"))).checkpoints


def _raises(error: OSError) -> Callable[[CheckpointReader], None]:
    def verify(_: CheckpointReader) -> None:
        raise error

    return verify


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_checkpoint_out_of_reach_is_waited_for_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    back = CheckpointFinder(tmp_path)
    for step in (9, 19):
        write_checkpoint(tmp_path, step)
    records = _records(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointReader, "verify", _raises(OSError(number, os.strerror(number), "shard-3")))
        assert back.newest_good(100.0, records) is None
    assert back.trouble.startswith(f"checkpoints can't be read: {os.strerror(number)}: shard-3; the run waits")
    assert "remove the checkpoint to go back to the one before" in back.trouble
    assert back.newest_good(100.5, records) is None  # not looked at again yet
    restore = back.newest_good(100.0 + LOOK_AGAIN_S, records)
    assert restore is not None and restore.step == 19 and not back.trouble


def test_a_checkpoint_with_a_missing_or_invalid_file_is_skipped(tmp_path: Path) -> None:
    back = CheckpointFinder(tmp_path)
    paths = [write_checkpoint(tmp_path, step) for step in (9, 19, 29)]
    next(paths[2].glob("shard-*")).unlink()
    shard = next(paths[1].glob("shard-*"))
    shard.unlink()
    shard.mkdir()
    restore = back.newest_good(0.0, _records(tmp_path))
    assert restore is not None and restore.step == 9 and not back.trouble


def test_without_reading_files_those_that_are_missing_or_truncated_are_found(tmp_path: Path) -> None:
    """Workers verify the rest."""
    back = CheckpointFinder(tmp_path)
    paths = [write_checkpoint(tmp_path, step) for step in (9, 19, 29, 39)]
    records = _records(tmp_path)
    next(paths[3].glob("shard-*")).unlink()
    shard = next(paths[2].glob("shard-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    shard = next(paths[1].glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    restore = back.newest_good(0.0, records, reads_files=False)
    assert restore is not None and (restore.step, restore.digest) == (19, records.current[1].sha256)
    restore = back.newest_good(0.0, records)
    assert restore is not None and restore.step == 9
    (paths[1] / MANIFEST_FILE).write_text("{}")
    restore = back.newest_good(0.0, records, reads_files=False)
    assert restore is not None and restore.step == 9 and not back.trouble


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_from_the_seed(tmp_path: Path) -> None:
    """It waits until one can be read, or the user has removed them."""
    back = CheckpointFinder(tmp_path)
    paths = [write_checkpoint(tmp_path, step) for step in (9, 19)]
    records = _records(tmp_path)
    for path in paths:
        next(path.glob("shard-*")).unlink()
    assert back.newest_good(0.0, records) is None
    assert "none is good" in back.trouble and "shard-" in back.trouble and "the run waits" in back.trouble
    for path in paths:
        discard(path)
    assert back.newest_good(LOOK_AGAIN_S, records) is None and not back.trouble


@pytest.mark.parametrize(("effect", "found"), [(Effect.ERROR, None), (Effect.FLIPPED, 9)], ids=["error", "bit flips"])
def test_a_checkpoint_whose_bytes_do_not_arrive_is_waited_for_and_one_whose_bytes_change_is_passed_over(
    fuse: FuseDisk, effect: Effect, found: int | None
) -> None:
    """On a file system that does so: as each shard of the newer one is read."""
    run_dir = fuse.path / effect.name
    run_dir.mkdir()
    back = CheckpointFinder(run_dir)
    for step in (9, 19):
        write_checkpoint(run_dir, step)
    records = _records(run_dir)
    drop_cache(run_dir)
    with fuse.having(CallFault("read", effect, "*/step-00000019-*/shard-*")):
        restore = back.newest_good(100.0, records)
    assert (restore and restore.step) == found
    assert bool(back.trouble) == (found is None)
    drop_cache(run_dir)
    if effect is Effect.FLIPPED:
        with fuse.having(CallFault("read", effect, "*/step-00000019-*/shard-*", nth=1)):
            restore = CheckpointFinder(run_dir).newest_good(100.0, records)
        assert restore is not None and restore.step == 19  # a bit that flips once is read again
    drop_cache(run_dir)
    restore = CheckpointFinder(run_dir).newest_good(100.0, records)
    assert restore is not None and restore.step == 19
