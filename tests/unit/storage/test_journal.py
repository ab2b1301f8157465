"""The journal's chain: one writer at a time, whatever the writers believe, and no entry that is not the next."""

import json
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, has_journal, newest_term, read_events


class FailingObjects:
    """A directory whose next `create` fails: before anything is stored, or after all of it is."""

    def __init__(self, run_dir: Path) -> None:
        self._inner = DirectoryObjects(run_dir)
        self.failure = ""

    def create(self, key: str, data: bytes) -> bytes:
        failure, self.failure = self.failure, ""
        if failure == "before":
            raise OSError(28, "No space left on device")
        found = self._inner.create(key, data)
        if failure == "after":
            raise OSError(5, "Input/output error")
        return found

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def names(self, folder: str) -> tuple[str, ...]:
        return self._inner.names(folder)

    def delete(self, keys: Iterable[str]) -> None:
        self._inner.delete(keys)


def journal_of(run_dir: Path) -> Journal:
    return Journal(DirectoryObjects(run_dir))


def kinds(run_dir: Path, after: int = -1) -> list[str]:
    return [event["kind"] for event in read_events(run_dir, after)]


def test_events_are_read_in_the_order_they_were_written(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    assert journal.append([]) == []
    assert kinds(tmp_path) == ["a", "b", "c"]
    assert [event["seq"] for event in read_events(tmp_path)] == [0, 1, 2]
    assert [path.name for path in sorted((tmp_path / "journal").iterdir())] == [f"{n:010d}" for n in range(3)]


@pytest.mark.parametrize(("after", "expected"), [(-1, "abc"), (0, "bc"), (1, "c"), (2, ""), (9, "")])
def test_reading_after_an_event(tmp_path: Path, after: int, expected: str) -> None:
    journal = journal_of(tmp_path)
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    assert "".join(kinds(tmp_path, after)) == expected


def test_an_event_can_not_forge_its_number(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    journal.append([{"kind": "a"}])
    (event,) = journal.append([{"kind": "b", "seq": 0, "term": 9}])
    assert (event["seq"], event["term"]) == (1, 1)
    assert kinds(tmp_path) == ["a", "b"]


def test_a_successor_continues_and_the_past_is_refused(tmp_path: Path) -> None:
    old = journal_of(tmp_path)
    old.append([{"kind": "a"}])
    new = journal_of(tmp_path)
    for _ in range(2):
        with pytest.raises(TermSuperseded, match="term 1 may not write to the journal: entry .* is of term 2"):
            old.append([{"kind": "late"}])
    new.append([{"kind": "b"}])
    with pytest.raises(TermSuperseded):
        old.append([{"kind": "later"}])
    assert kinds(tmp_path) == ["a", "b"]
    assert (old.term, new.term, newest_term(tmp_path)) == (1, 2, 2)


def test_a_term_is_given_once(tmp_path: Path) -> None:
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.append(journal_of(tmp_path).term)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


@pytest.mark.parametrize("failure", ["before", "after"])
def test_an_append_that_failed_may_be_repeated(tmp_path: Path, failure: str) -> None:
    """Whether the failed entry was stored or not, the journal goes on behind it."""
    objects = FailingObjects(tmp_path)
    journal = Journal(objects)
    journal.append([{"kind": "a"}])
    objects.failure = failure
    with pytest.raises(OSError, match="No space|Input/output"):
        journal.append([{"kind": "b"}])
    (event,) = journal.append([{"kind": "c"}])
    assert kinds(tmp_path) == (["a", "c"] if failure == "before" else ["a", "b", "c"])
    assert event["seq"] == len(kinds(tmp_path)) - 1


def test_a_failed_append_does_not_hide_a_successor(tmp_path: Path) -> None:
    objects = FailingObjects(tmp_path)
    old = Journal(objects)
    objects.failure = "before"
    with pytest.raises(OSError, match="No space"):
        old.append([{"kind": "a"}])
    journal_of(tmp_path).append([{"kind": "b"}])
    with pytest.raises(TermSuperseded):
        old.append([{"kind": "c"}])
    assert kinds(tmp_path) == ["b"]


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_events(tmp_path) == [] and newest_term(tmp_path) == 0 and not has_journal(tmp_path)


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    for kind in "abc":
        journal.append([{"kind": kind}])
    (tmp_path / "journal" / "0000000002").unlink()
    with pytest.raises(JournalCorrupt, match="journal/0000000002 is missing"):
        read_events(tmp_path)
    assert kinds(tmp_path, after=1) == ["c"]  # what is read is whole


def test_a_changed_entry_is_named(tmp_path: Path) -> None:
    journal = journal_of(tmp_path)
    for kind in "abc":
        journal.append([{"kind": kind}])
    path = tmp_path / "journal" / "0000000002"
    path.write_text(path.read_text().replace('"b"', '"x"'))
    with pytest.raises(JournalCorrupt, match="journal/0000000002 is not the one that entry 3 follows"):
        read_events(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", json.dumps({"term": 1}).encode()])
def test_an_entry_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    journal_of(tmp_path)
    (tmp_path / "journal" / "0000000000").write_bytes(data)
    with pytest.raises(JournalCorrupt, match="journal/0000000000 can't be read"):
        newest_term(tmp_path)
    with pytest.raises(JournalCorrupt, match="journal/0000000000 can't be read"):
        journal_of(tmp_path)
