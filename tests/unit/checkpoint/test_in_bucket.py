"""Checkpoints in a bucket, by the same calls as in a directory."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint import block_digests
from orchestrator.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, checkpoint_name, manifest_of
from orchestrator.checkpoint.read import CheckpointReader, read_manifest
from orchestrator.checkpoint.retention import discard, discard_unnamed
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.shard_image import ShardMemory
from orchestrator.checkpoint.stored_bytes import ObjectBytes
from orchestrator.checkpoint.write import commit, write_image
from orchestrator.errors import CheckpointCorrupt
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from orchestrator.storage.storage_process import StorageProcess
from tests.support.checkpoints import write_shard
from tests.support.request_proxy import RequestFault, RequestProxy

VALUES = np.arange(5_000, dtype=np.float32)
COUNTS = np.array([1, -2, 3], np.int64)
SHAPES, DTYPES = {"master/a": (50, 100), "buffer/b": (3,)}, {"buffer/b": "int64"}
BLOCK_BYTES = block_digests.BLOCK_BYTES
number = count()


@pytest.fixture
def checkpoints(bucket: tuple[str, RequestProxy], monkeypatch: pytest.MonkeyPatch) -> BucketUrl:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 200)
    monkeypatch.setattr(ObjectBytes, "read_bytes", 1_000)
    return BucketUrl(bucket[0]) / f"checkpoints-{next(number)}"


def write(checkpoints: Location, step: int) -> CheckpointManifest:
    pieces = [
        [ShardPiece("master/a", 0, 1_234, VALUES[:1_234])],
        [ShardPiece("master/a", 1_234, 5_000, VALUES[1_234:]), ShardPiece("buffer/b", 0, 3, COUNTS)],
    ]
    shards = [
        write_shard(checkpoints, mine, step=step, term=1, generation=0, rank=rank, meta='{"position": 64}')
        for rank, mine in enumerate(pieces)
    ]
    return manifest_of(read_shards(checkpoints, shards, term=1), run_id="r", term=1, shapes=SHAPES, dtypes=DTYPES)


def test_any_range_reads_back(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    path = commit(checkpoints, write(checkpoints, 9))
    assert path == checkpoints / checkpoint_name(9, 1, 0)
    with CheckpointReader(path) as reader:
        reader.verify()
        assert reader.manifest.meta == {"position": 64}
        for start, stop in ((0, 5_000), (0, 0), (1_233, 1_236), (1_234, 1_234), (4_999, 5_000), (17, 3_333)):
            np.testing.assert_array_equal(reader.read("master/a", start, stop), VALUES[start:stop], strict=True)
        np.testing.assert_array_equal(reader.read("buffer/b", 1, 3), COUNTS[1:], strict=True)


def test_it_is_the_checkpoint_that_a_directory_would_hold(
    checkpoints: BucketUrl, proxy: RequestProxy, tmp_path: Path
) -> None:
    there, here = write(checkpoints, 9), write(tmp_path, 9)
    digests = [sorted(e.header_sha256 for e in manifest.files.values()) for manifest in (there, here)]
    assert digests[0] == digests[1]


def test_a_request_answers_the_next_reads_too(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    path = commit(checkpoints, write(checkpoints, 9))
    with CheckpointReader(path) as reader:
        reader.read("master/a", 0, 1)
        proxy.forget()
        for start in range(0, 200, 7):
            np.testing.assert_array_equal(reader.read("master/a", start, start + 50), VALUES[start : start + 50])
        assert proxy.requests == {}
        reader.read("master/a", 1_000, 1_010)
        assert proxy.requests == {"GET": 1}
        np.testing.assert_array_equal(reader.read("master/a", 3, 5), VALUES[3:5])
    assert proxy.requests == {"GET": 2}


def test_ranges_that_lie_together_take_one_request(
    checkpoints: BucketUrl, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ObjectBytes, "read_bytes", 4_000)
    path = commit(checkpoints, write(checkpoints, 9))
    # In the first file 700 elements and, after a gap of many blocks, 34 in the last two; in the second one 2,000, from
    # element 766 on, in the first three windows of 1,000.
    wanted = [("master/a", 1_200, 1_234), ("master/a", 400, 700), ("master/a", 0, 395), ("master/a", 2_000, 4_000)]
    with CheckpointReader(path) as reader:
        reader.read("master/a", 0, 1), reader.read("buffer/b", 0, 1)  # headers
        proxy.forget()
        found = {index: [] for index in range(len(wanted))}
        for index, start, values in reader.read_all(wanted):
            found[index].append((start, values.copy()))
        assert proxy.requests == {"GET": 5}
    for index, (_, start, stop) in enumerate(wanted):
        values = np.concatenate([values for _, values in sorted(found[index], key=lambda part: part[0])])
        np.testing.assert_array_equal(values, VALUES[start:stop])


def test_what_is_lost_on_the_way_is_sent_again(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    for fault in (RequestFault.LOST_REPLY, RequestFault.LOST_REQUEST, RequestFault.UNAVAILABLE):
        proxy.fail("PUT", fault, None, fault)
        proxy.fail("GET", None, fault)
        step = next(number)
        with CheckpointReader(commit(checkpoints, write(checkpoints, step))) as reader:
            reader.verify()


def test_a_shard_that_storage_refuses_leaves_nothing(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    with proxy.failing("PUT", RequestFault.FORBIDDEN), pytest.raises(PermissionError, match="403"):
        write(checkpoints, 9)
    assert objects_at(checkpoints).objects("") == ()


def test_a_shard_that_reads_back_changed_is_an_error(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    with proxy.failing("GET", RequestFault.FLIPPED), pytest.raises(OSError, match="reads back changed: .* has sha256"):
        write(checkpoints, 9)
    assert objects_at(checkpoints).objects("") == ()


def change(checkpoint: Location, name: str, data: bytes) -> None:
    objects_at(checkpoint).delete([name])
    objects_at(checkpoint).create(name, data)


def test_damage_is_named(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    manifest = write(checkpoints, 9)
    path = commit(checkpoints, manifest)
    name = next(iter(manifest.files))
    data = objects_at(path).get(name)
    change(path, name, data[:-1] + bytes([data[-1] ^ 1]))
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name}: block 24 has sha256"):
        reader.verify()
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name}: block 24 has sha256"):
        list(reader.read_all([("master/a", 1_200, 1_234)]))
    change(path, name, data[:-8])
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name}: it ends within block 24"):
        reader.read("master/a", 0, 5_000)
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name} has {len(data) - 8} bytes"):
        reader.verify()
    change(path, name, b"none")
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name}: header has sha256"):
        reader.read("master/a", 0, 5_000)
    objects_at(path).delete([name])
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match=f"{name} is missing"):
        reader.verify()
    with pytest.raises(CheckpointCorrupt, match=f"{name} has no file, its rank wrote"):
        commit(checkpoints, manifest)
    change(path, MANIFEST_FILE, b"{}")
    with pytest.raises(CheckpointCorrupt, match="manifest.json can't be trusted"):
        read_manifest(path)


def test_parts_of_earlier_attempts_are_deleted_at_the_commit(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    lost, manifest = write(checkpoints, 9), write(checkpoints, 9)
    path = commit(checkpoints, manifest)
    assert commit(checkpoints, manifest) == path
    assert (
        set(objects_at(path).names("")) == {*manifest.files, MANIFEST_FILE}
        and lost.files.keys() & manifest.files == set()
    )


def test_checkpoints_are_deleted(checkpoints: BucketUrl, proxy: RequestProxy) -> None:
    kept, old = commit(checkpoints, write(checkpoints, 9)), commit(checkpoints, write(checkpoints, 5))
    write(checkpoints, 7)
    write(checkpoints, 8)
    discard(old)
    deleted = discard_unnamed(checkpoints, [kept.name], lambda step, term, generation: step == 8)
    assert deleted == (checkpoints / checkpoint_name(7, 1, 0),)
    assert objects_at(checkpoints).names("") == (checkpoint_name(8, 1, 0), kept.name)


def test_another_process_writes_a_shard_from_this_ones_memory(
    checkpoints: BucketUrl, proxy: RequestProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", BLOCK_BYTES)  # as in the other process
    monkeypatch.setattr(ObjectBytes, "read_bytes", BLOCK_BYTES)
    process = StorageProcess("checkpoints")
    with ShardMemory([ShardPiece("master/a", 0, 5_000, VALUES)], "{}", 0) as memory:
        where = {"step": 3, "term": 1, "generation": 0, "rank": 0}
        proxy.fail("PUT", RequestFault.LOST_REPLY)
        written = process.call(write_image, checkpoints, memory.image, **where)
        assert written.num_bytes == memory.image.num_bytes and written.header_sha256 == memory.image.digest()
    manifest = manifest_of(
        read_shards(checkpoints, [written], term=1), run_id="r", term=1, shapes={"master/a": (50, 100)}
    )
    with CheckpointReader(commit(checkpoints, manifest)) as reader:
        reader.verify()
        np.testing.assert_array_equal(reader.read("master/a", 0, 5_000), VALUES, strict=True)
    process.close()
