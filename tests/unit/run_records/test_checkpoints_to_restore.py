"""Which checkpoint a run goes back to, and when it waits instead."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.write import commit, write_shard
from orchestrator.run_records.checkpoints import DIRECTORY, LOOK_AGAIN_S, CheckpointFinder


def _checkpoint(run_dir: Path, step: int) -> Path:
    directory = run_dir / DIRECTORY
    piece = ShardPiece("w", 0, 2, np.full(2, step, np.float32))
    shard = write_shard(directory, [piece], step=step, term=1, generation=0, rank=0, meta="{}")
    shards = read_shards(directory, [shard], term=1)
    return commit(directory, manifest_of(shards, run_id="r", term=1, shapes={"w": (2,)}), term=1)


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
        _checkpoint(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointReader, "verify", _raises(OSError(number, os.strerror(number), "shard-3")))
        assert back.newest_good(100.0) is None
    assert back.trouble.startswith(f"checkpoints can't be read: {os.strerror(number)}: shard-3; the run waits")
    assert "remove the checkpoint to go back to the one before" in back.trouble
    assert back.newest_good(100.5) is None  # not looked at again yet
    restore = back.newest_good(100.0 + LOOK_AGAIN_S)
    assert restore is not None and restore.step == 19 and not back.trouble


def test_a_checkpoint_whose_file_is_gone_or_is_none_is_passed_over(tmp_path: Path) -> None:
    back = CheckpointFinder(tmp_path)
    paths = [_checkpoint(tmp_path, step) for step in (9, 19, 29)]
    next(paths[2].glob("shard-*")).unlink()
    shard = next(paths[1].glob("shard-*"))
    shard.unlink()
    shard.mkdir()
    restore = back.newest_good(0.0)
    assert restore is not None and restore.step == 9 and not back.trouble
