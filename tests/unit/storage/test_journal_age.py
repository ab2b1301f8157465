"""Age of a journal: by storage's clock, whatever this machine's is."""

import os
import time
from pathlib import Path

import pytest

from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from orchestrator.storage.journal_age import journal_age_s
from tests.support.storages import storage_of


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_journal_ages(kind: str, tmp_path: Path) -> None:
    with storage_of(kind, tmp_path / "at") as make:
        objects = make()
        assert journal_age_s(objects) == float("inf")
        began_s = time.monotonic()
        Journal(objects).append([{"kind": "a"}])
        assert journal_age_s(objects) < 60.0
        time.sleep(1.1)  # S3's clock has whole seconds
        assert 0.1 <= journal_age_s(objects) <= time.monotonic() - began_s + 1.0
        assert objects.names("journal") == ("0000000000", "0000000001")


def test_a_journal_that_was_just_compacted_is_young(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path)
    Journal(objects)
    written_s = time.time() - 500.0
    os.utime(tmp_path / "journal" / "0000000000", (written_s, written_s))
    objects.create("journal/state-0000000000", b"")
    assert journal_age_s(objects) < 60.0


def test_a_clock_that_is_an_hour_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = DirectoryObjects(tmp_path)
    Journal(objects)
    written_s = time.time() - 500.0
    os.utime(tmp_path / "journal" / "0000000000", (written_s, written_s))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0)
    assert 499.0 < journal_age_s(objects) < 560.0


def test_storage_that_refuses_to_write(tmp_path: Path) -> None:
    class Full(DirectoryObjects):
        def create(self, key: str, data: bytes) -> bytes:
            raise OSError(28, "No space left on device")

    Journal(DirectoryObjects(tmp_path))
    written_s = time.time() - 500.0
    os.utime(tmp_path / "journal" / "0000000000", (written_s, written_s))
    assert 499.0 < journal_age_s(Full(tmp_path)) < 560.0
