"""Checkpoints on a file system whose calls fail, tear writes and flip bits."""

import errno
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, FileEntry, checkpoint_name, manifest_of
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.stored_shard import open_shard
from orchestrator.checkpoint.write import commit
from orchestrator.errors import CheckpointCorrupt
from orchestrator.protocol.worker_report import ShardWritten
from tests.support.call_faults import CallFault, Effect
from tests.support.checkpoints import write_shard
from tests.support.fuse_disk import FuseDisk, drop_cache

number = count()
VALUES = np.arange(100_000, dtype=np.float32)
FAULTS = [  # of every call that writes a file and reads it back
    pytest.param(CallFault(call, effect), id=f"{call}-{effect.name}")
    for call, effects in {
        "create": [Effect.ERROR, Effect.LOST_REPLY],
        "write": [Effect.ERROR, Effect.LOST_REPLY, Effect.TORN, Effect.FLIPPED],
        "fsync": [Effect.ERROR, Effect.LOST_REPLY],
        "open": [Effect.ERROR],
        "read": [Effect.ERROR, Effect.FLIPPED],
        "fsyncdir": [Effect.ERROR],
    }.items()
    for effect in effects
]


@pytest.fixture
def checkpoints(fuse: FuseDisk) -> Path:
    run_dir = fuse.path / str(next(number))
    run_dir.mkdir()
    return run_dir / "checkpoints"


def write(checkpoints: Path) -> ShardWritten:
    return write_shard(checkpoints, [ShardPiece("w", 0, VALUES.size, VALUES)], step=9, term=1, generation=0, rank=0)


def written(checkpoints: Path) -> CheckpointManifest:
    headers = read_shards(checkpoints, [write(checkpoints)], term=1)
    return manifest_of(headers, run_id="r", term=1, shapes={"w": VALUES.shape})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_of_which_any_call_fails_leaves_nothing(fuse: FuseDisk, checkpoints: Path, fault: CallFault) -> None:
    with fuse.having(fault):
        with pytest.raises(OSError, match="Input/output error|reads back changed") as failed:
            write(checkpoints)
        assert fuse.hits() >= 1
    assert failed.value.errno == errno.EIO
    assert [path for path in checkpoints.rglob("*") if path.is_file()] == []
    shard = write(checkpoints)
    checkpoint = checkpoints / checkpoint_name(9, 1, 0)
    drop_cache(checkpoint)
    open_shard(checkpoint, shard.file, FileEntry(shard.header_sha256, shard.num_bytes)).verify()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_of_which_any_call_fails_is_whole_or_absent(
    fuse: FuseDisk, checkpoints: Path, fault: CallFault
) -> None:
    manifest = written(checkpoints)
    path = checkpoints / manifest.name
    with fuse.having(fault):
        with pytest.raises(OSError, match="Input/output error|reads back changed"):
            commit(checkpoints, manifest)
        assert fuse.hits() >= 1
    drop_cache(path)
    content = manifest.to_json().encode()
    assert not (path / MANIFEST_FILE).exists() or (path / MANIFEST_FILE).read_bytes() == content
    assert commit(checkpoints, manifest) == path
    drop_cache(path)
    assert {file.name for file in path.iterdir()} == {*manifest.files, MANIFEST_FILE}
    with CheckpointReader(path, manifest.digest) as reader:
        reader.verify()
        np.testing.assert_array_equal(reader.read("w", 0, VALUES.size), VALUES)


def test_a_manifest_whose_reply_is_lost_is_committed(fuse: FuseDisk, checkpoints: Path) -> None:
    manifest = written(checkpoints)
    with fuse.having(CallFault("link", Effect.LOST_REPLY)):
        path = commit(checkpoints, manifest)
        assert fuse.hits() == 1
    drop_cache(path)
    with CheckpointReader(path, manifest.digest) as reader:
        reader.verify()


def test_bits_of_a_shard_that_flip_as_it_is_read_are_found_and_one_that_flips_once_is_read_again(
    fuse: FuseDisk, checkpoints: Path
) -> None:
    path = commit(checkpoints, written(checkpoints))
    with CheckpointReader(path) as reader:
        reader.read("w", 0, 1)  # its header
        drop_cache(path)
        with fuse.having(CallFault("read", Effect.FLIPPED)):
            with pytest.raises(CheckpointCorrupt, match="shard-00000.*: block [01] has sha256"):
                reader.verify()
            with pytest.raises(CheckpointCorrupt, match="shard-00000.*: block 1 has sha256"):
                reader.read("w", VALUES.size - 1, VALUES.size)
            with pytest.raises(CheckpointCorrupt, match="shard-00000.*: block 1 has sha256"):
                list(reader.read_all([("w", VALUES.size - 1, VALUES.size)]))
    for nth in (1, 2):
        drop_cache(path)
        with fuse.having(CallFault("read", Effect.FLIPPED, "*/shard-*", nth=nth)), CheckpointReader(path) as reader:
            np.testing.assert_array_equal(reader.read("w", 0, VALUES.size), VALUES)
            assert fuse.hits() == 1


def test_a_shard_that_can_not_be_read_is_an_error_and_no_end_of_the_process(fuse: FuseDisk, checkpoints: Path) -> None:
    """As with a file that is mapped into memory."""
    path = commit(checkpoints, written(checkpoints))
    with CheckpointReader(path) as reader:
        reader.read("w", 0, 1)
        drop_cache(path)
        with fuse.having(CallFault("read", Effect.ERROR)), pytest.raises(OSError, match="Input/output error"):
            reader.read("w", 0, VALUES.size)
        np.testing.assert_array_equal(reader.read("w", 0, VALUES.size), VALUES)
