"""Write, commit, read, verify and prune on real files: any world reads any other's, damage is named."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from orchestrator.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    ShardPart,
    incomplete_name,
    manifest_of,
)
from orchestrator.checkpoint.read import CheckpointReader, choose, list_checkpoints, prune, set_aside
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.write import commit, write_shard
from orchestrator.errors import CheckpointCorrupt, NotFound, ProtocolError, TermSuperseded

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
    return commit(checkpoints, write(checkpoints, state, step, world_size, term, generation), term=term)


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
    path = tmp_path / incomplete_name(1, 1, 0) / shard.file
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["master/w[0:77]"], state["master/w"], strict=True)
    np.testing.assert_array_equal(loaded["buffer/count[3:5]"], np.array([1, -2], np.int64), strict=True)
    np.testing.assert_array_equal(loaded["buffer/mask[0:4]"], np.array([True, False, True, True]), strict=True)
    np.testing.assert_array_equal(loaded["buffer/strided[0:3]"], np.array([0, 2, 4], np.float32), strict=True)
    assert (shard.sha256, shard.num_bytes) == ((hashlib.sha256(path.read_bytes()).hexdigest(),), path.stat().st_size)


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
    commit(tmp_path, manifest_of(before, run_id="r", term=1, shapes={"w": (4,)}), term=1)
    assert read_shards(tmp_path, shards, term=1) == before


@pytest.mark.parametrize("at", [0, 7, 8, 20])
def test_a_changed_header_is_refused(tmp_path: Path, at: int) -> None:
    piece = ShardPiece("w", 0, 4, np.arange(4, dtype=np.float32))
    shard = write_shard(tmp_path, [piece], step=3, term=1, generation=0, rank=0)
    path = tmp_path / incomplete_name(3, 1, 0) / shard.file
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


def test_only_committed_checkpoints_are_listed(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nowhere") == ()
    write(tmp_path, state_of(0), 40)  # the ranks wrote, the controller died before its commit
    assert list_checkpoints(tmp_path) == ()
    paths = [save(tmp_path, state_of(0), step) for step in (30, 100_000_000, 20)]
    assert list_checkpoints(tmp_path) == (paths[2], paths[0], paths[1])


def test_a_commit_interrupted_at_the_rename_is_not_listed_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path, state_of(0), 40)

    def power_cut(self: Path, target: Path) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", power_cut)
        with pytest.raises(OSError, match="power cut"):
            commit(tmp_path, manifest, term=1)
    assert list_checkpoints(tmp_path) == ()
    assert_same(read_all(commit(tmp_path, manifest, term=1)), state_of(0))


def test_commit_refuses_a_shard_that_is_not_all_there(tmp_path: Path) -> None:
    manifest = write(tmp_path, state_of(0), 40)
    shard = tmp_path / incomplete_name(40, 1, 0) / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointCorrupt, match=f"{len(content) - 1} bytes, its rank wrote {len(content)}"):
        commit(tmp_path, manifest, term=1)
    shard.unlink()
    with pytest.raises(CheckpointCorrupt, match="no file"):
        commit(tmp_path, manifest, term=1)
    assert list_checkpoints(tmp_path) == ()


def test_a_repeated_commit_changes_nothing(tmp_path: Path) -> None:
    manifest = write(tmp_path, state_of(0), 40)
    first = commit(tmp_path, manifest, term=1)
    assert commit(tmp_path, manifest, term=1) == first
    assert_same(read_all(first), state_of(0))


def test_a_later_term_or_generation_replaces_the_step(tmp_path: Path) -> None:
    save(tmp_path, state_of(0), 40, term=1)
    save(tmp_path, state_of(1), 40, term=2, generation=0)
    path = save(tmp_path, state_of(2), 40, world_size=3, term=2, generation=1)
    assert_same(read_all(path), state_of(2))
    assert list_checkpoints(tmp_path) == (path,)


def test_the_past_can_not_commit(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 40, term=2, generation=5)
    with pytest.raises(TermSuperseded, match="term 1 may not commit step 60"):
        save(tmp_path, state_of(1), 60, term=1, generation=9)
    with pytest.raises(ProtocolError, match="generation 4 may not commit step 40"):
        save(tmp_path, state_of(1), 40, term=2, generation=4)
    assert list_checkpoints(tmp_path) == (path,)
    assert_same(read_all(path), state_of(0))


def test_a_new_controller_commits_what_the_generation_before_it_wrote(tmp_path: Path) -> None:
    manifest = write(tmp_path, state_of(0), 40, term=1)
    path = commit(tmp_path, manifest, term=2)
    assert_same(read_all(path), state_of(0))
    with pytest.raises(TermSuperseded, match="term 2 commits"):
        commit(tmp_path, write(tmp_path, state_of(0), 60, term=1), term=1)
    with pytest.raises(TermSuperseded):
        commit(tmp_path, manifest, term=1)


def test_an_unreadable_checkpoint_can_be_replaced_by_a_replay(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 40)
    (path / MANIFEST_FILE).write_text("{}")
    assert save(tmp_path, state_of(0), 40, generation=1) == path
    assert_same(read_all(path), state_of(0))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_verify_names_the_file_both_digests_and_the_previous_good_checkpoint(tmp_path: Path) -> None:
    paths = [save(tmp_path, state_of(step), step) for step in (10, 20, 30)]
    for path in paths[1:]:
        flip_byte(path / "shard-00001.safetensors")
    reader = CheckpointReader(paths[2])
    written = reader.manifest.files["shard-00001.safetensors"].sha256[0]
    found = hashlib.sha256((paths[2] / "shard-00001.safetensors").read_bytes()).hexdigest()
    with pytest.raises(CheckpointCorrupt) as raised:
        reader.verify()
    for part in ("shard-00001.safetensors", written, found, f"before it is {paths[0]}"):
        assert part in str(raised.value)


def test_verify_says_that_there_is_no_good_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, state_of(0), 10)
    reader = CheckpointReader(path)
    (path / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"shard-00000.safetensors is missing.*no good checkpoint before it"):
        reader.verify()


@pytest.mark.parametrize("damage", ["file-missing", "file-cut", "other-tensors", "other-dtype"])
def test_reading_a_damaged_file_raises_and_never_invents_values(tmp_path: Path, damage: str) -> None:
    state = state_of(0)
    path = save(tmp_path, state, 10, world_size=1)
    shard = path / "shard-00000.safetensors"
    if damage == "file-missing":
        shard.unlink()
    elif damage == "file-cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        dtype, stop = (np.float64, 77) if damage == "other-dtype" else (np.float32, 76)
        write_shard(
            tmp_path,
            [ShardPiece("master/w", 0, stop, np.zeros(stop, dtype))],
            step=99,
            term=1,
            generation=0,
            rank=0,
        )
        (tmp_path / incomplete_name(99, 1, 0) / shard.name).replace(shard)
    with CheckpointReader(path) as reader, pytest.raises(CheckpointCorrupt, match="shard-00000"):
        reader.read("master/w", 0, 77)


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
    with pytest.raises(CheckpointCorrupt, match="not of the step"):
        CheckpointReader(path.rename(tmp_path / "step-00000011"))


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with CheckpointReader(save(tmp_path, state_of(0), 10)) as reader:
        with pytest.raises(NotFound, match="master/v"):
            reader.read("master/v", 0, 1)
        for start, stop in ((-1, 3), (3, 2), (0, 78)):
            with pytest.raises(ValueError, match="lies outside"):
                reader.read("master/w", start, stop)


def test_prune_keeps_the_newest_and_what_may_still_be_finished(tmp_path: Path) -> None:
    paths = [save(tmp_path, state_of(0), step, term=2) for step in (10, 20, 30)]
    write(tmp_path, state_of(0), 25, term=2)  # later shards of the same writers are committed: given up
    write(tmp_path, state_of(0), 50, term=1)  # of the past
    write(tmp_path, state_of(0), 20, term=3)  # a replay on its way
    write(tmp_path, state_of(0), 40, term=2)  # on its way
    assert prune(tmp_path, keep_last=2) == (paths[0],)
    assert list_checkpoints(tmp_path) == tuple(paths[1:])
    unfinished = {path.name for path in tmp_path.iterdir() if path.is_dir()} - {path.name for path in paths}
    assert unfinished == {incomplete_name(20, 3, 0), incomplete_name(40, 2, 0)}
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune(tmp_path, keep_last=0)


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, state_of(step), step)
    prune(tmp_path, keep_last=1, keep_steps=[2])
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_the_newest_is_chosen_unless_a_step_is_named(tmp_path: Path) -> None:
    assert choose(tmp_path) is None
    first, second = save(tmp_path, state_of(1), 1), save(tmp_path, state_of(2), 2)
    assert choose(tmp_path) == second
    assert choose(tmp_path, 1) == first
    with pytest.raises(NotFound, match="no checkpoint of step 5; it holds 1, 2"):
        choose(tmp_path, 5)


def test_a_damaged_checkpoint_is_not_chosen_and_the_one_before_is_offered(tmp_path: Path) -> None:
    first, second = save(tmp_path, state_of(1), 1), save(tmp_path, state_of(2), 2)
    shard = next(second.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointCorrupt) as caught:
        choose(tmp_path)
    assert str(first) in caught.value.remedy
    assert choose(tmp_path, 1) == first


def test_checkpoints_of_an_abandoned_future_are_hidden_but_not_lost(tmp_path: Path) -> None:
    states = {step: state_of(step) for step in (1, 2, 3)}
    for step, state in states.items():
        save(tmp_path, state, step)
    hidden = set_aside(tmp_path, after_step=1, mark="000002")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [path.is_dir() for path in hidden] == [True, True]
    again = save(tmp_path, state_of(9), 2, term=2)
    assert_same(read_all(again), state_of(9))


def test_a_commit_hides_later_steps_of_the_past_that_was_abandoned(tmp_path: Path) -> None:
    """The run went back from step 30 to 10, twice, and did step 20 again."""
    first = save(tmp_path, state_of(1), 10, generation=0)
    for generation in (1, 3):
        late = save(tmp_path, state_of(3), 30, generation=generation)
        kept = write(tmp_path, state_of(2), 20, generation=generation + 1)
        again = commit(tmp_path, kept, term=1)
        assert list_checkpoints(tmp_path) == (first, again) and choose(tmp_path) == again
        hidden = tmp_path / f".superseded-000001-{generation + 1:06d}-{late.name}"
        assert (hidden / MANIFEST_FILE).is_file()  # nothing is deleted
        assert commit(tmp_path, kept, term=1) == again
    later = save(tmp_path, state_of(4), 40, generation=4)
    assert commit(tmp_path, kept, term=2) == again and list_checkpoints(tmp_path) == (first, again, later)


def test_a_part_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    piece = ShardPiece("w", 0, 4, np.arange(4, dtype=np.float32))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, [piece], step=3, term=1, generation=0, rank=0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
