"""A shard in memory is the file that it will be, and another process can write it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestrator.checkpoint.manifest import checkpoint_name
from orchestrator.checkpoint.shard_file import ShardPiece, read_shards
from orchestrator.checkpoint.shard_image import ShardMemory
from orchestrator.checkpoint.write import write_image
from orchestrator.storage.storage_process import StorageProcess


def _pieces() -> list[ShardPiece]:
    return [
        ShardPiece("a", 0, 3, np.array([1.0, 2.0, 3.0], np.float32)),
        ShardPiece("b", 5, 5, np.array([], np.float32)),
        ShardPiece("b", 5, 7, np.array([7, 8], np.int64)),
    ]


def test_another_process_writes_the_file_as_it_was_when_the_image_was_made(tmp_path: Path) -> None:
    pieces, process = _pieces(), StorageProcess("test")
    with ShardMemory(pieces, '{"step": 4}', rank=0) as memory:
        pieces[0].array.fill(9.0)
        written = process.call(write_image, tmp_path, memory.image, step=4, term=1, generation=0, rank=0)
    process.close()
    assert written.num_bytes == memory.image.num_bytes and 0.0 < written.cost_s < 60.0
    ((_, header),) = read_shards(tmp_path, [written], term=1)
    assert header.meta == {"step": 4}
    found = load_file(tmp_path / checkpoint_name(4, 1, 0) / written.file)
    assert {key: list(array) for key, array in found.items()} == {"a[0:3]": [1.0, 2.0, 3.0], "b[5:7]": [7, 8]}


def test_only_the_first_rank_stores_what_is_no_tensor_and_all_have_its_digest() -> None:
    with ShardMemory(_pieces(), '{"step": 4}', rank=0) as first, ShardMemory(_pieces(), '{"step": 4}', rank=1) as other:
        assert first.image.meta_sha256 == other.image.meta_sha256
        assert b"step" in Path(first.image.path).read_bytes() and b"step" not in Path(other.image.path).read_bytes()


def test_memory_that_is_closed_is_gone() -> None:
    with ShardMemory(_pieces(), "{}", rank=0) as memory:
        assert Path(memory.image.path).stat().st_size == memory.image.num_bytes
    assert not Path(memory.image.path).exists()


def test_an_array_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2 elements of float32"):
        ShardMemory([ShardPiece("a", 0, 3, np.zeros(2, np.float32))], "{}", rank=0)
