"""The reserve on real file systems: a small tmpfs that fills up where this runs as root, else the test's directory."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage import reserve
from orchestrator.storage.reserve import RESERVE_BYTES, SpaceReserve


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", disk]).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_space_is_reserved_and_given_up_once(tmp_path: Path) -> None:
    kept = SpaceReserve(tmp_path)
    kept.tend()
    assert kept.is_taken and (tmp_path / ".reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    assert SpaceReserve(tmp_path).is_taken  # a successor finds it
    assert kept.give_up() and not kept.give_up()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_takes_a_write_once_the_reserve_is_given_up(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve, "TAKE_AGAIN_S", 0.0)
    kept = SpaceReserve(small_disk)
    kept.tend()
    assert kept.is_taken
    with pytest.raises(OSError, match="No space"):
        (small_disk / "large").write_bytes(bytes(30 * 2**20))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "more").write_bytes(bytes(2**20))
    assert kept.give_up()
    (small_disk / "journal").write_bytes(bytes(2 * 2**20))
    kept.tend()
    assert not kept.is_taken  # what little is left isn't taken again
    (small_disk / "large").unlink()
    kept.tend()
    assert kept.is_taken
