"""What a directory does beyond the contract of `Objects`, which `test_objects` holds."""

import errno
import os
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.objects import StoredObject


def test_hidden_files_are_no_objects(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path)
    objects.create("x/a", b"1")
    (tmp_path / "x" / ".hidden").write_text("a write that was cut off")
    (tmp_path / ".folder").mkdir()
    (tmp_path / ".folder" / "b").write_text("a directory that is being removed")
    assert objects.names("x") == ("a",)
    assert objects.objects("") == (StoredObject("x/a", 1),)


def test_a_file_system_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match="without hard links"):
        DirectoryObjects(tmp_path).create("x/a", b"1")
    assert list((tmp_path / "x").iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("stored", [True, False])
def test_a_doubtful_answer_is_settled_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    real = os.link

    def link(source: Path, target: Path) -> None:
        if stored:
            real(source, target)
        raise OSError(errno.EIO, "Input/output error")

    objects = DirectoryObjects(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", link)
        if stored:
            assert objects.create("x/a", b"1") == b"1"
        else:
            with pytest.raises(OSError, match="Input/output"):
                objects.create("x/a", b"1")
    assert objects.create("x/a", b"1") == b"1"
