"""The contract of `Objects`, kept by a directory."""

import errno
import os
import threading
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.directory import DirectoryObjects


def test_an_object_is_created_once(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "run")
    assert objects.create("a/b", b"first") == b"first"
    assert objects.create("a/b", b"second") == b"first"
    assert objects.create("a/b", b"first") == b"first"  # a repeated call whose reply was lost
    assert objects.get("a/b") == b"first"


def test_one_of_many_concurrent_creations_wins(tmp_path: Path) -> None:
    objects, found = DirectoryObjects(tmp_path), set[bytes]()
    barrier = threading.Barrier(32)

    def create(data: bytes) -> None:
        barrier.wait()
        found.add(objects.create("journal/0", data))

    threads = [threading.Thread(target=create, args=(bytes([i]) * 1000,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {objects.get("journal/0")}


def test_names_are_those_of_objects(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path)
    assert objects.names("none") == ()
    for key in ("x/b", "x/a", "x/deeper/c"):
        objects.create(key, key.encode())
    (tmp_path / "x" / ".hidden").write_text("a write that was cut off")
    assert objects.names("x") == ("a", "b", "deeper")


def test_deletion_skips_what_is_absent(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path)
    objects.create("x/a", b"1")
    objects.delete(["x/a", "x/b"])
    assert objects.names("x") == ()


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
