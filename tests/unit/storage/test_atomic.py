"""Files and directories are replaced whole, or stay as they were."""

from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.storage.atomic import create_atomically, new_directory, replacing, write_atomically


def _content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    write_atomically(tmp_path / "file", "new")
    assert _content(tmp_path) == {"file": "new"}


def test_a_failed_write_changes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    with suppress(ValueError), replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise ValueError
    assert _content(tmp_path) == {"file": "old"}


def test_a_created_file_is_never_overwritten(tmp_path: Path) -> None:
    create_atomically(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        create_atomically(tmp_path / "file", b"second")
    assert _content(tmp_path) == {"file": "first"}


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with suppress(ValueError), new_directory(final) as filled:
        (filled / "a").write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    final.mkdir()  # an empty one is replaced
    with new_directory(final) as filled:
        (filled / "a").write_text("whole")
        assert list(final.iterdir()) == []
    assert _content(final) == {"a": "whole"}
    with pytest.raises(OSError), new_directory(final) as filled:
        (filled / "a").write_text("other")
    assert _content(final) == {"a": "whole"} and list(tmp_path.iterdir()) == [final]
