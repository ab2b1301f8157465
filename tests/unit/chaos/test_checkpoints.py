"""The chaos suite's own reader of checkpoints: reads what the product writes, and finds what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.checkpoints import Named, broken_promises, differing, faults_of, garbage_in, promised, tensors_of
from tests.chaos.journal import Event, whole_chain
from tests.support.checkpoints import VALUES, write_checkpoint


def _promised(run_dir: Path) -> list[Named]:
    return promised(whole_chain(run_dir).events, keep_last=2)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_checkpoint_is_read_whole(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    assert [named.path(tmp_path) for named in _promised(tmp_path)] == [path]
    assert broken_promises(tmp_path, _promised(tmp_path)) == []
    tensors = tensors_of(path)
    assert list(tensors) == ["buffer/b", "master/a"]
    assert np.array_equal(tensors["master/a"], VALUES) and tensors["buffer/b"].tolist() == [1, 2]


def _flip_a_bit(checkpoint: Path) -> None:
    _flip(next(checkpoint.glob("shard-00001-*")), -1)


def _change_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


def _lose_a_piece(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    outer = json.loads(path.read_text())
    outer["manifest"]["tensors"]["master/a"]["pieces"].pop()
    path.write_text(json.dumps(outer))


def _lose_a_file(checkpoint: Path) -> None:
    next(checkpoint.glob("shard-00000-*")).unlink()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_flip_a_bit, ".safetensors: a digest differs"),
        (_change_the_manifest, "the manifest's digest differs"),
        (_lose_a_piece, "master/a: pieces don't cover it once"),
        (_lose_a_file, ".safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_found(tmp_path: Path, damage: Callable[[Path], None], fault: str) -> None:
    damage(write_checkpoint(tmp_path))
    assert any(fault in found for found in broken_promises(tmp_path, _promised(tmp_path)))


def test_a_lost_checkpoint_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    lost = Named(40, "step-00000040-000001-000000", "")
    (fault,) = broken_promises(tmp_path, [*_promised(tmp_path), lost])
    assert fault.startswith("the checkpoint of step 40")
    with pytest.raises(FileNotFoundError):
        faults_of(lost.path(tmp_path), lost.sha256)


def test_one_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    tensors = tensors_of(write_checkpoint(tmp_path))
    other = {name: values.copy() for name, values in tensors.items()}
    assert differing(tensors, other) == []
    other["master/a"].view(np.uint32)[3] ^= 1
    assert differing(tensors, other) == ["master/a"]
    assert differing(tensors, {"master/a": tensors["master/a"]}) == ["buffer/b"]


def _done(*steps: int) -> list[Event]:
    return [{"kind": "checkpoint", "step": step, "path": f"/{step}", "sha256": ""} for step in steps]


def _steps(events: list[Event]) -> list[int]:
    return [named.step for named in promised(events, keep_last=2)]


def test_the_newest_checkpoints_are_promised() -> None:
    assert _steps(_done(20, 40, 60)) == [40, 60]
    assert _steps(_done(20)) == [20]
    assert _steps([]) == []


def test_deleted_and_given_up_checkpoints_are_not_promised() -> None:
    deleted = {"kind": "checkpoints_deleted", "steps": [20, 40]}
    assert _steps([*_done(20, 40, 60), deleted]) == [60]
    begun = {"kind": "activated", "step": 45}
    assert _steps([*_done(20, 40, 60), begun]) == [20, 40]
    assert _steps([*_done(20, 40, 60), begun, *_done(60)]) == [40, 60]


def test_garbage_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    events = whole_chain(tmp_path).events
    assert garbage_in(tmp_path, events, num_killed=0) == []
    (tmp_path / "checkpoints" / "step-00000040-000001-000000").mkdir()
    (tmp_path / ".reserve").touch()
    unnamed = ["step-00000040-000001-000000", ".reserve"]
    assert garbage_in(tmp_path, events, num_killed=0) == unnamed
    deleted = {"kind": "checkpoints_deleted", "steps": [20]}
    assert sorted(garbage_in(tmp_path, [*events, deleted], num_killed=0)) == sorted(
        ["step-00000020-000001-000000", *unnamed]
    )


def test_a_killed_process_may_leave_a_file_that_it_was_writing(tmp_path: Path) -> None:
    (tmp_path / ".status.json.12.partial").touch()
    assert garbage_in(tmp_path, [], num_killed=1) == []
    assert garbage_in(tmp_path, [], num_killed=0) == [".status.json.12.partial"]
