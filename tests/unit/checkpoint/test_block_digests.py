"""Digests of blocks, and the first one that differs."""

import hashlib
from pathlib import Path

import pytest

from orchestrator.checkpoint import block_digests
from orchestrator.checkpoint.block_digests import digests_of, first_difference, num_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_digests, "BLOCK_BYTES", 10)


def _digests(content: bytes) -> tuple[str, ...]:
    return tuple(hashlib.sha256(content[start : start + 10]).hexdigest() for start in range(0, len(content), 10))


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 25])
def test_every_block_has_one(tmp_path: Path, size: int) -> None:
    content = bytes(range(size))
    (tmp_path / "file").write_bytes(b"header" + content)
    found = digests_of(tmp_path / "file", start=6)
    assert found == _digests(content) and len(found) == num_blocks(size)


def test_the_first_block_that_differs_is_named() -> None:
    content = bytes(range(25))
    wrong = hashlib.sha256(b"").hexdigest()
    one, two, three = _digests(content)
    assert first_difference(content, (one, two, three), 0) == ""
    assert first_difference(content[10:], (one, two, three), 1) == ""
    message = f"block 1 has sha256 {two}, it was written with {wrong}"
    assert first_difference(content, (one, wrong, wrong), 0) == message
    assert first_difference(content[10:], (one, wrong, wrong), 1) == message
