"""The chaos suite's own reader of checkpoints: reads what the product writes, and finds what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.checkpoints import (
    broken_promises,
    checkpoint_dir,
    differing,
    faults_of,
    garbage_in,
    promised_steps,
    tensors_of,
)
from tests.support.checkpoints import VALUES, write_checkpoint


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_good_checkpoint_is_read_whole(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path) == checkpoint_dir(tmp_path, 20)
    assert broken_promises(tmp_path, [20]) == []
    tensors = tensors_of(checkpoint_dir(tmp_path, 20))
    assert list(tensors) == ["buffer/b", "master/a"]
    assert np.array_equal(tensors["master/a"], VALUES) and tensors["buffer/b"].tolist() == [1, 2]


def _flip_a_bit(checkpoint: Path) -> None:
    _flip(checkpoint / "shard-00001.safetensors", -1)


def _change_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"step": 20', '"step": 21'))


def _lose_a_piece(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    outer = json.loads(path.read_text())
    outer["manifest"]["tensors"]["master/a"]["pieces"].pop()
    path.write_text(json.dumps(outer))


def _lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "shard-00000.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (_flip_a_bit, "shard-00001.safetensors: a digest differs"),
        (_change_the_manifest, "the manifest's digest differs"),
        (_lose_a_piece, "master/a: pieces don't cover it once"),
        (_lose_a_file, "shard-00000.safetensors is missing"),
    ],
)
def test_a_damaged_checkpoint_is_found(tmp_path: Path, damage: Callable[[Path], None], fault: str) -> None:
    damage(write_checkpoint(tmp_path))
    assert any(fault in found for found in broken_promises(tmp_path, [20]))


def test_a_lost_checkpoint_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (fault,) = broken_promises(tmp_path, [20, 40])
    assert fault.startswith("the checkpoint of step 40")
    with pytest.raises(FileNotFoundError):
        faults_of(checkpoint_dir(tmp_path, 40))


def test_one_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    tensors = tensors_of(write_checkpoint(tmp_path))
    other = {name: values.copy() for name, values in tensors.items()}
    assert differing(tensors, other) == []
    other["master/a"].view(np.uint32)[3] ^= 1
    assert differing(tensors, other) == ["master/a"]
    assert differing(tensors, {"master/a": tensors["master/a"]}) == ["buffer/b"]


def _done(*steps: int) -> list[dict[str, object]]:
    return [{"kind": "checkpoint", "step": step} for step in steps]


def test_the_newest_checkpoints_are_promised() -> None:
    assert promised_steps(_done(20, 40, 60), keep_last=2) == [40, 60]
    assert promised_steps(_done(20), keep_last=2) == [20]
    assert promised_steps([], keep_last=2) == []


def test_deleted_and_given_up_checkpoints_are_not_promised() -> None:
    deleted = {"kind": "checkpoints_deleted", "steps": [20, 40]}
    assert promised_steps([*_done(20, 40, 60), deleted], keep_last=2) == [60]
    begun = {"kind": "activated", "step": 45}
    assert promised_steps([*_done(20, 40, 60), begun], keep_last=2) == [20, 40]
    assert promised_steps([*_done(20, 40, 60), begun, *_done(60)], keep_last=2) == [40, 60]


def test_garbage_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert garbage_in(tmp_path, num_killed=0) == []
    (tmp_path / "checkpoints" / ".incomplete-00000040-000001-000000").mkdir()
    (tmp_path / "checkpoints" / ".discarded-step-00000020").mkdir()
    (tmp_path / ".reserve").touch()
    assert sorted(garbage_in(tmp_path, num_killed=0)) == [
        ".discarded-step-00000020",
        ".incomplete-00000040-000001-000000",
        ".reserve",
    ]


def test_a_killed_process_may_leave_a_file_that_it_was_writing(tmp_path: Path) -> None:
    (tmp_path / ".status.json.12.partial").touch()
    assert garbage_in(tmp_path, num_killed=1) == []
    assert garbage_in(tmp_path, num_killed=0) == [".status.json.12.partial"]
