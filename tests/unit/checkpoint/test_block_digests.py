"""Digests of blocks, whatever pieces the bytes come in."""

import hashlib
from pathlib import Path

import pytest

from orchestrator.checkpoint import block_digests
from orchestrator.checkpoint.block_digests import BlockDigests, digests_of, digests_on_device, first_difference


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 10)
    monkeypatch.setattr(block_digests, "READ_BYTES", 3)


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25])
@pytest.mark.parametrize("piece", [1, 7, 10, 25])
def test_blocks_do_not_depend_on_pieces(tmp_path: Path, size: int, piece: int) -> None:
    content = bytes(range(size))
    digests = BlockDigests()
    for start in range(0, size, piece):
        digests.update(memoryview(content)[start : start + piece])
    wanted = tuple(hashlib.sha256(content[start : start + 10]).hexdigest() for start in range(0, size, 10))
    (tmp_path / "file").write_bytes(content)
    assert digests.all() == digests_of(tmp_path / "file") == digests_on_device(tmp_path / "file") == wanted


def test_the_first_block_that_differs_is_named() -> None:
    assert first_difference(("a", "b"), ("a", "b")) == ""
    assert first_difference(("a", "c", "d"), ("a", "b", "e")) == "block 1 has sha256 c, it was written with b"
    assert first_difference(("a",), ("a", "b")) == "block 1 has sha256 None, it was written with b"
