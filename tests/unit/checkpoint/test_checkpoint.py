"""Write, commit, read and verify on real files: any world reads any other's, damage is named."""

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from orchestrator.checkpoint import block_digests
from orchestrator.checkpoint.manifest import (
    FORMAT,
    MANIFEST_FILE,
    CheckpointManifest,
    ShardPart,
    checkpoint_name,
    manifest_of,
)
from orchestrator.checkpoint.read import CheckpointReader, read_manifest
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.stored_bytes import FileBytes
from orchestrator.checkpoint.write import commit
from orchestrator.errors import CheckpointCorrupt, NotFound
from tests.support.checkpoints import write_shard

State = dict[str, npt.NDArray[np.float32]]
SHAPES = {"master/w": (7, 11), "exp_avg/w": (7, 11), "buffer/bias": (5,), "buffer/empty": (0,)}


def state_of(seed: int) -> State:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, dtype=np.float32).reshape(-1) for name, shape in SHAPES.items()}


def write(
    checkpoints: Path, state: State, step: int, world_size: int = 2, term: int = 1, generation: int = 0
) -> CheckpointManifest:
    """What a world of `world_size` ranks writes: each tensor cut into as many ranges, unevenly."""
    shards = []
    for rank in range(world_size):
        pieces = []
        for name, values in state.items():
            cuts = [values.size * r * r // world_size**2 for r in range(world_size + 1)]
            pieces.append(ShardPiece(name, cuts[rank], cuts[rank + 1], values[cuts[rank] : cuts[rank + 1]]))
        shards.append(
            write_shard(
                checkpoints, pieces, step=step, term=term, generation=generation, rank=rank, meta='{"position": 64}'
            )
        )
    return manifest_of(read_shards(checkpoints, shards, term=term), run_id="r", term=term, shapes=SHAPES)


def save(checkpoints: Path, state: State, step: int, world_size: int = 2, term: int = 1, generation: int = 0) -> Path:
    return commit(checkpoints, write(checkpoints, state, step, world_size, term, generation))


def files_of(directory: Path) -> list[Path]:
    """The shards' files, by rank."""
    return sorted(directory.glob("shard-*"))


def read_all(checkpoint: Path) -> State:
    with CheckpointReader(checkpoint) as reader:
        return {name: reader.read(name, 0, tensor.numel) for name, tensor in reader.manifest.tensors.items()}


def assert_same(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name, strict=True)


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
def test_any_range_reads_back_whatever_world_wrote_it(tmp_path: Path, writers: int) -> None:
    state = state_of(0)
    with CheckpointReader(save(tmp_path, state, 120, writers)) as reader:
        reader.verify()
        assert reader.manifest.meta == {"position": 64}
        for name, values in state.items():
            for start in range(values.size + 1):
                for stop in (start, (start + values.size + 1) // 2, values.size):
                    np.testing.assert_array_equal(reader.read(name, start, stop), values[start:stop], strict=True)


@pytest.mark.parametrize("first_bytes", [8, 100])
def test_headers_that_are_longer_than_the_first_read_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: int
) -> None:
    monkeypatch.setattr("orchestrator.checkpoint.stored_shard.LIKELY_HEADER_BYTES", first_bytes)
    assert_same(read_all(save(tmp_path, state_of(0), 120, 2)), state_of(0))


@pytest.mark.parametrize("read_bytes", [2**24, 20])
@pytest.mark.parametrize("writers", [1, 3])
def test_many_ranges_read_back_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int, read_bytes: int
) -> None:
    monkeypatch.setattr(FileBytes, "read_bytes", read_bytes)
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 10)
    state = state_of(0)
    path = save(tmp_path, state, 9, writers)
    wanted = [
        ("exp_avg/w", 3, 60),
        ("master/w", 0, 77),
        ("exp_avg/w", 70, 77),
        ("buffer/bias", 0, 5),
        ("master/w", 5, 9),
    ]
    found = [np.full(stop - start, np.nan, np.float32) for _, start, stop in [*wanted, ("buffer/empty", 0, 0)]]
    with CheckpointReader(path) as reader:
        for index, start, values in reader.read_all([*wanted, ("buffer/empty", 0, 0)]):
            begin = start - wanted[index][1]
            found[index][begin : begin + len(values)] = values
        with pytest.raises(NotFound, match="no tensor 'lost'"):
            list(reader.read_all([("lost", 0, 1)]))
        with pytest.raises(ValueError, match="outside of 'master/w'"):
            list(reader.read_all([("master/w", 70, 78)]))
    for (name, start, stop), values in zip(wanted, found, strict=False):
        np.testing.assert_array_equal(values, state[name][start:stop])


def test_worlds_of_different_sizes_write_the_same_tensors(tmp_path: Path) -> None:
    state = state_of(0)
    two, three = save(tmp_path / "a", state, 5, 2), save(tmp_path / "b", state, 5, 3)
    assert_same(read_all(two), read_all(three))


def test_the_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    state = state_of(0)
    shard = write_shard(
        tmp_path,
        [
            ShardPiece("master/w", 0, 77, state["master/w"]),
            ShardPiece("buffer/count", 3, 5, np.array([1, -2], np.int64)),
            ShardPiece("buffer/mask", 0, 4, np.array([True, False, True, True])),
            ShardPiece("buffer/strided", 0, 3, np.arange(6, dtype=np.float32)[::2]),
        ],
        step=1,
        term=1,
        generation=0,
        rank=3,
    )
    path = tmp_path / checkpoint_name(1, 1, 0) / shard.file
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["master/w[0:77]"], state["master/w"], strict=True)
    np.testing.assert_array_equal(loaded["buffer/count[3:5]"], np.array([1, -2], np.int64), strict=True)
    np.testing.assert_array_equal(loaded["buffer/mask[0:4]"], np.array([True, False, True, True]), strict=True)
    np.testing.assert_array_equal(loaded["buffer/strided[0:3]"], np.array([0, 2, 4], np.float32), strict=True)
    content = path.read_bytes()
    behind = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256(content[:behind]).hexdigest()
    assert (shard.header_sha256, shard.num_bytes) == (digest, path.stat().st_size)
    header = json.loads(content[8:behind])
    assert header["__metadata__"]["blocks"] == hashlib.sha256(content[behind:]).hexdigest()


def test_headers_name_the_pieces_and_rank_0_has_the_rest(tmp_path: Path) -> None:
    pieces = [ShardPiece("master/a[1]", 3, 5, np.zeros(2, np.float32)), ShardPiece("b", 0, 1, np.zeros(1, np.uint8))]
    shards = [
        write_shard(tmp_path, pieces[rank : rank + 1], step=1, term=2, generation=3, rank=rank, meta='{"position": 64}')
        for rank in range(2)
    ]
    first, second = (header for _, header in read_shards(tmp_path, shards, term=2))
    assert first.parts == (("master/a[1]", ShardPart(shards[0].file, "master/a[1][3:5]", 3, 5)),)
    assert second.parts == (("b", ShardPart(shards[1].file, "b[0:1]", 0, 1)),)
    assert (first.meta, second.meta) == ({"position": 64}, None)
    assert shards[0].meta_sha256 == shards[1].meta_sha256


def test_headers_are_read_of_a_committed_checkpoint_too(tmp_path: Path) -> None:
    piece = ShardPiece("w", 0, 4, np.arange(4, dtype=np.float32))
    shards = [write_shard(tmp_path, [piece], step=3, term=1, generation=0, rank=0)]
    before = read_shards(tmp_path, shards, term=1)
    commit(tmp_path, manifest_of(before, run_id="r", term=1, shapes={"w": (4,)}))
    assert read_shards(tmp_path, shards, term=1) == before


@pytest.mark.parametrize("at", [0, 7, 8, 20])
def test_a_changed_header_is_refused(tmp_path: Path, at: int) -> None:
    piece = ShardPiece("w", 0, 4, np.arange(4, dtype=np.float32))
    shard = write_shard(tmp_path, [piece], step=3, term=1, generation=0, rank=0)
    path = tmp_path / checkpoint_name(3, 1, 0) / shard.file
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match="has a header with sha256"):
        read_shards(tmp_path, [shard], term=1)
    path.write_bytes(b"")
    with pytest.raises(CheckpointCorrupt, match="has a header with sha256"):
        read_shards(tmp_path, [shard], term=1)
    path.unlink()
    with pytest.raises(CheckpointCorrupt, match="has no file"):
        read_shards(tmp_path, [shard], term=1)


@pytest.mark.parametrize(
    ("pieces", "rule"),
    [
        pytest.param([ShardPiece("t", 0, 3, np.zeros(2, np.float32))], "got 2 elements", id="length"),
        pytest.param([ShardPiece("t", 0, 2, np.zeros(2, np.float16))], "of float16", id="dtype"),
        pytest.param([ShardPiece("t", 0, 2, np.zeros(2, np.float32))] * 2, "named twice", id="twice"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path, pieces: list[ShardPiece], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        write_shard(tmp_path, pieces, step=1, term=1, generation=0, rank=0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, state_of(0), 40)  # the ranks wrote, the controller died before its commit
    with pytest.raises(CheckpointCorrupt, match="is missing; a checkpoint has a manifest"):
        CheckpointReader(tmp_path / checkpoint_name(40, 1, 0))


def test_nothing_is_ever_renamed_or_written_over(tmp_path: Path) -> None:
    """A rank that writes again writes another file; only what the manifest doesn't name is deleted."""
    lost = write(tmp_path, state_of(1), 40)
    manifest = write(tmp_path, state_of(0), 40)
    assert not set(lost.files) & set(manifest.files)
    directory = tmp_path / checkpoint_name(40, 1, 0)
    before = {name: ((directory / name).stat().st_ino, (directory / name).read_bytes()) for name in manifest.files}
    (directory / ".manifest.json.0123.partial").write_text("cut sho")
    assert commit(tmp_path, manifest) == directory
    assert {path.name for path in directory.iterdir()} == {*manifest.files, MANIFEST_FILE}
    assert {name: ((directory / name).stat().st_ino, (directory / name).read_bytes()) for name in before} == before
    assert_same(read_all(directory), state_of(0))


def test_commit_refuses_a_shard_that_is_not_all_there(tmp_path: Path) -> None:
    manifest = write(tmp_path, state_of(0), 40)
    directory = tmp_path / checkpoint_name(40, 1, 0)
    shard = files_of(directory)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointCorrupt, match=f"{len(content) - 1} bytes, its rank wrote {len(content)}"):
        commit(tmp_path, manifest)
    shard.unlink()
    with pytest.raises(CheckpointCorrupt, match="no file"):
        commit(tmp_path, manifest)
    assert not (directory / MANIFEST_FILE).exists()


def test_a_repeated_commit_changes_nothing(tmp_path: Path) -> None:
    manifest = write(tmp_path, state_of(0), 40)
    first = commit(tmp_path, manifest)
    written = (first / MANIFEST_FILE).stat()
    assert commit(tmp_path, manifest) == first
    assert (first / MANIFEST_FILE).stat().st_ino == written.st_ino
    assert hashlib.sha256((first / MANIFEST_FILE).read_bytes()).hexdigest() == manifest.digest
    assert_same(read_all(first), state_of(0))


def test_a_manifest_that_reads_back_changed_is_deleted_by_the_call_that_created_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of the real file is flipped at the moment between write and read-back."""
    manifest, drop = write(tmp_path, state_of(0), 40), os.posix_fadvise

    def damage(descriptor: int, *args: int) -> None:
        with Path(f"/proc/self/fd/{descriptor}").open("r+b") as file:
            file.write(b"[")
            os.fsync(file.fileno())
        drop(descriptor, *args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fadvise", damage)
        with pytest.raises(OSError, match="manifest.json reads back changed"):
            commit(tmp_path, manifest)
    assert not (tmp_path / manifest.name / MANIFEST_FILE).exists()
    assert_same(read_all(commit(tmp_path, manifest)), state_of(0))


def test_a_damaged_manifest_that_was_there_is_not_deleted(tmp_path: Path) -> None:
    """Another controller may have journalled it."""
    manifest = write(tmp_path, state_of(0), 40)
    path = commit(tmp_path, manifest)
    (path / MANIFEST_FILE).write_text("damaged")
    for _ in range(2):
        with pytest.raises(OSError, match="manifest.json reads back changed"):
            commit(tmp_path, manifest)
    assert (path / MANIFEST_FILE).read_text() == "damaged"


def test_writers_of_the_same_step_do_not_collide(tmp_path: Path) -> None:
    """A step that was done again, and a generation that another cluster knew nothing of."""
    writers = ((1, 0), (1, 1), (2, 1))
    paths = [save(tmp_path, state_of(t + g), 40, term=t, generation=g) for t, g in writers]
    for path, (term, generation) in zip(paths, writers, strict=True):
        assert_same(read_all(path), state_of(term + generation))


def flip_byte(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _block(path: Path) -> str:
    """The digest of the only block of a file."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_verify_names_the_file_and_both_digests(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 10)
    shard = files_of(path)[1]
    was = _block(shard)
    flip_byte(shard)
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointCorrupt) as raised:
        reader.verify()
    for part in (shard.name, was, _block(shard)):
        assert part in str(raised.value)
    shard.unlink()
    with pytest.raises(CheckpointCorrupt, match=f"{shard.name} is missing"):
        reader.verify()


@pytest.mark.parametrize("damage", ["file-missing", "file-cut", "other-tensors", "other-dtype"])
def test_reading_a_damaged_file_raises_and_never_invents_values(tmp_path: Path, damage: str) -> None:
    state = state_of(0)
    path = save(tmp_path, state, 10, world_size=1)
    (shard,) = files_of(path)
    if damage == "file-missing":
        shard.unlink()
    elif damage == "file-cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        dtype, stop = (np.float64, 77) if damage == "other-dtype" else (np.float32, 76)
        piece = ShardPiece("master/w", 0, stop, np.zeros(stop, dtype))
        other = write_shard(tmp_path, [piece], step=99, term=1, generation=0, rank=0)
        (tmp_path / checkpoint_name(99, 1, 0) / other.file).replace(shard)
    with CheckpointReader(path) as reader:
        with pytest.raises(CheckpointCorrupt, match="shard-00000"):
            reader.read("master/w", 0, 77)
        with pytest.raises(CheckpointCorrupt, match="shard-00000"):
            list(reader.read_all([("exp_avg/w", 0, 0), ("master/w", 0, 77)]))


# -- blocks ------------------------------------------------------------------------------------------------------------

BLOCK = 40  # bytes
NUMBERS = np.arange(100, dtype=np.float32)  # ten blocks of ten elements


@pytest.fixture
def of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of one file."""
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", BLOCK)
    shard = write_shard(tmp_path, [ShardPiece("w", 0, 100, NUMBERS)], step=3, term=1, generation=0, rank=0)
    return commit(
        tmp_path, manifest_of(read_shards(tmp_path, [shard], term=1), run_id="r", term=1, shapes={"w": (100,)})
    )


def _reads(path: Path, start: int, stop: int) -> list[npt.NDArray[np.float32]]:
    """These elements, read in both ways."""
    with CheckpointReader(path) as reader:
        together = [values.copy() for _, _, values in reader.read_all([("w", start, stop)])]
        return [reader.read("w", start, stop), np.concatenate(together)]


@pytest.mark.parametrize("read_bytes", [BLOCK, 2 * BLOCK, 2**20])
@pytest.mark.parametrize("block", [0, 4, 9])
def test_damage_is_found_by_who_reads_its_block_and_only_there(
    of_blocks: Path, monkeypatch: pytest.MonkeyPatch, block: int, read_bytes: int
) -> None:
    monkeypatch.setattr(FileBytes, "read_bytes", read_bytes)
    flip_byte(files_of(of_blocks)[0], at=BLOCK * (block - 10))
    for start in range(0, 100, 7):
        for stop in range(start + 1, 101, 9):
            if start // 10 <= block <= (stop - 1) // 10:
                with CheckpointReader(of_blocks) as reader:
                    with pytest.raises(CheckpointCorrupt, match=f"shard-00000.*: block {block} has sha256"):
                        reader.read("w", start, stop)
                    with pytest.raises(CheckpointCorrupt, match=f"shard-00000.*: block {block} has sha256"):
                        list(reader.read_all([("w", start, stop)]))
            else:
                for found in _reads(of_blocks, start, stop):
                    np.testing.assert_array_equal(found, NUMBERS[start:stop], strict=True)
    with CheckpointReader(of_blocks) as reader, pytest.raises(CheckpointCorrupt, match=f": block {block} has sha256"):
        reader.verify()


def test_swapped_blocks_are_damage(of_blocks: Path) -> None:
    (file,) = files_of(of_blocks)
    content = file.read_bytes()
    behind = len(content) - 10 * BLOCK
    blocks = [content[behind + at :][:BLOCK] for at in range(0, 10 * BLOCK, BLOCK)]
    blocks[3], blocks[7] = blocks[7], blocks[3]
    file.write_bytes(content[:behind] + b"".join(blocks))
    for block in (3, 7):
        with pytest.raises(CheckpointCorrupt, match=f"block {block} has sha256"):
            _reads(of_blocks, 10 * block, 10 * block + 1)
    for found in _reads(of_blocks, 40, 70):
        np.testing.assert_array_equal(found, NUMBERS[40:70])


@pytest.mark.parametrize("lacking", [1, BLOCK, BLOCK + 1])
def test_a_truncated_file_is_damage_for_who_reads_its_end(of_blocks: Path, lacking: int) -> None:
    (file,) = files_of(of_blocks)
    num_bytes = file.stat().st_size
    os.truncate(file, num_bytes - lacking)
    first = 9 - lacking // (BLOCK + 1)
    with pytest.raises(CheckpointCorrupt, match=f"shard-00000.*: it ends within block {first}"):
        _reads(of_blocks, 10 * first, 100)
    for found in _reads(of_blocks, 0, 80):
        np.testing.assert_array_equal(found, NUMBERS[:80])
    with CheckpointReader(of_blocks) as reader:
        for check in (reader.check_sizes, reader.verify):
            with pytest.raises(CheckpointCorrupt, match=f"has {num_bytes - lacking} bytes, it was written with"):
                check()


def test_a_changed_digest_in_a_header_is_damage(of_blocks: Path) -> None:
    (file,) = files_of(of_blocks)
    content = file.read_bytes()
    digest = hashlib.sha256(content[-BLOCK:]).hexdigest().encode()
    file.write_bytes(content.replace(digest, digest[::-1]))
    with pytest.raises(CheckpointCorrupt, match="shard-00000.*: header has sha256"):
        _reads(of_blocks, 0, 1)


def test_a_checkpoint_whose_manifest_can_not_be_trusted_does_not_open(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 10)
    manifest = path / MANIFEST_FILE
    text = manifest.read_text()
    manifest.write_text(text.replace('"position": 64', '"position": 65'))
    with pytest.raises(CheckpointCorrupt, match="can't be trusted"):
        CheckpointReader(path)
    manifest.unlink()
    with pytest.raises(CheckpointCorrupt, match="is missing"):
        CheckpointReader(path)
    manifest.write_text(text)
    with pytest.raises(CheckpointCorrupt, match="the run's journal names it with"):
        read_manifest(path, "ab" * 32)
    with pytest.raises(CheckpointCorrupt, match=f"belongs to {path.name}, which is not the name of its directory"):
        CheckpointReader(path.rename(tmp_path / checkpoint_name(11, 1, 0)))


def test_an_older_format_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 10)
    manifest = path / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace(FORMAT, "orchestrator-checkpoint-v3"))
    with pytest.raises(
        CheckpointCorrupt, match="has format 'orchestrator-checkpoint-v3', this version reads"
    ) as raised:
        CheckpointReader(path)
    assert "Use the version that wrote it" in raised.value.remedy


def test_reads_of_missing_objects(tmp_path: Path) -> None:
    with CheckpointReader(save(tmp_path, state_of(0), 10)) as reader:
        with pytest.raises(NotFound, match="master/v"):
            reader.read("master/v", 0, 1)
        for start, stop in ((-1, 3), (3, 2), (0, 78)):
            with pytest.raises(ValueError, match="lies outside"):
                reader.read("master/w", start, stop)


def test_a_part_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    piece = ShardPiece("w", 0, 4, np.arange(4, dtype=np.float32))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, [piece], step=3, term=1, generation=0, rank=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
