"""What is deleted of a run's checkpoints, and what is not."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import incomplete_name, manifest_of
from orchestrator.checkpoint.read import SUPERSEDED_PREFIX, discard, list_checkpoints, list_steps
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.write import commit, write_shard
from orchestrator.run_records.checkpoints import (
    DIRECTORY,
    discard_unfinished,
    drop_old_checkpoints,
    drop_superseded,
    leave_behind,
    newest_good,
)
from orchestrator.spec.fault_tolerance import CheckpointSpec
from tests.support.disk import small_disk

MB = 2**20


def _write(run_dir: Path, step: int, generation: int = 0, megabytes: int = 3) -> Path:
    checkpoints = run_dir / DIRECTORY
    size = megabytes * MB // 4
    piece = ShardPiece("w", 0, size, np.full(size, step, np.float32))
    shard = write_shard(checkpoints, [piece], step=step, term=1, generation=generation, rank=0)
    shards = read_shards(checkpoints, [shard], term=1)
    return commit(checkpoints, manifest_of(shards, run_id="r", term=1, shapes={"w": (size,)}), term=1)


def _superseded(run_dir: Path) -> list[str]:
    return sorted(p.name[-8:] for p in (run_dir / DIRECTORY).iterdir() if p.name.startswith(SUPERSEDED_PREFIX))


def test_parts_that_can_not_be_completed_are_deleted(tmp_path: Path) -> None:
    names = [incomplete_name(step, term, generation) for step, term, generation in ((9, 1, 0), (19, 1, 1), (29, 2, 1))]
    for name in (*names, "step-00000005", ".discarded-step-00000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    discard_unfinished(tmp_path, 2, lambda step, term, generation: (term, generation) == (1, 1))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {names[1], "step-00000005"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run on a disk of 24 MB that has gone back from step 40 to 10: four checkpoints of 3 MB."""
    with small_disk(tmp_path / "disk", 24) as disk:
        for step in (10, 20, 30, 40):
            _write(disk, step)
        leave_behind(disk, 10, 1, 1)
        yield disk


def _fill_up_to(disk: Path, megabytes: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - megabytes * MB))


def test_a_disk_with_room_keeps_superseded_checkpoints(run_dir: Path) -> None:
    drop_superseded(run_dir)
    assert _superseded(run_dir) == ["00000020", "00000030", "00000040"] and list_steps(run_dir / DIRECTORY) == (10,)


def test_on_a_full_disk_superseded_checkpoints_go_until_the_next_one_fits(run_dir: Path) -> None:
    _fill_up_to(run_dir, 2)
    with pytest.raises(OSError, match="No space left"):
        _write(run_dir, 20, generation=1)
    drop_superseded(run_dir)
    assert _superseded(run_dir) == ["00000040"]
    assert newest_good(run_dir) is not None
    assert _write(run_dir, 20, generation=1) == list_checkpoints(run_dir / DIRECTORY)[-1]


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_without_a_good_checkpoint_nothing_superseded_is_deleted(run_dir: Path, harm: str) -> None:
    """They may hold the run's last good state."""
    _fill_up_to(run_dir, 0)
    (only,) = list_checkpoints(run_dir / DIRECTORY)
    if harm == "gone":
        discard(only)
        _fill_up_to(run_dir, 0)
    else:
        shard = next(only.glob("shard-*"))
        with shard.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"x")
    drop_superseded(run_dir)
    assert _superseded(run_dir) == ["00000020", "00000030", "00000040"]


def test_the_last_two_good_checkpoints_are_kept_after_the_newest_ones_were_damaged(tmp_path: Path) -> None:
    """The run goes back to step 20, past two damaged ones, and writes another one."""
    for step in (10, 20, 30, 40):
        _write(tmp_path, step, megabytes=1)
    for path in list_checkpoints(tmp_path / DIRECTORY)[2:]:
        (next(path.glob("shard-*"))).write_bytes(b"")
    restore = newest_good(tmp_path)
    assert restore is not None and restore.step == 20
    leave_behind(tmp_path, restore.step, 1, 1)
    _write(tmp_path, 35, generation=1)
    assert drop_old_checkpoints(tmp_path, CheckpointSpec(keep_last=2), ()) == (10,)
    assert list_steps(tmp_path / DIRECTORY) == (20, 35)
    found = newest_good(tmp_path)
    assert found is not None and found.step == 35


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_only_a_newer_checkpoint_makes_an_old_one_go(tmp_path: Path, keep_last: int) -> None:
    for step in range(1, 6):
        _write(tmp_path, step, megabytes=1)
        drop_old_checkpoints(tmp_path, CheckpointSpec(keep_last=keep_last), ())
        assert list_steps(tmp_path / DIRECTORY) == tuple(range(max(1, step - keep_last + 1), step + 1))
