import threading
from pathlib import Path

import pytest

from orchestrator.errors import TermSuperseded
from orchestrator.storage.journal import Journal, acquire_term, newest_term, read_events


def kinds(run_dir: Path, after: int = -1) -> list[str]:
    return [event["kind"] for event in read_events(run_dir, after)]


def test_events_are_read_in_the_order_they_were_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, acquire_term(tmp_path))
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    journal.append([])
    assert kinds(tmp_path) == ["a", "b", "c"]
    assert [event["seq"] for event in read_events(tmp_path)] == [0, 1, 2]
    assert [path.name for path in sorted((tmp_path / "journal").iterdir())] == [
        "000001-00000000.json",
        "000001-00000002.json",
    ]


@pytest.mark.parametrize(("after", "expected"), [(-1, "abc"), (0, "bc"), (1, "c"), (2, ""), (9, "")])
def test_reading_after_an_event(tmp_path: Path, after: int, expected: str) -> None:
    journal = Journal(tmp_path, acquire_term(tmp_path))
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    assert "".join(kinds(tmp_path, after)) == expected


def test_an_event_can_not_forge_its_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path, acquire_term(tmp_path))
    journal.append([{"kind": "a"}])
    (event,) = journal.append([{"kind": "b", "seq": 0, "term": 9}])
    assert (event["seq"], event["term"]) == (1, 1)
    assert kinds(tmp_path) == ["a", "b"]


def test_a_successor_continues_and_the_past_is_refused(tmp_path: Path) -> None:
    old = Journal(tmp_path, acquire_term(tmp_path))
    old.append([{"kind": "a"}])
    new = Journal(tmp_path, acquire_term(tmp_path))
    with pytest.raises(TermSuperseded, match="term 1 may not write"):
        old.append([{"kind": "late"}])
    new.append([{"kind": "b"}])
    assert kinds(tmp_path) == ["a", "b"]
    assert newest_term(tmp_path) == 2


def test_a_write_that_slips_past_the_check_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Journal(tmp_path, acquire_term(tmp_path))
    old.append([{"kind": "a"}])
    new = Journal(tmp_path, acquire_term(tmp_path))
    new.append([{"kind": "b"}])
    with monkeypatch.context() as patched:  # it had looked just before the successor took its term
        patched.setattr("orchestrator.storage.journal.newest_term", lambda run_dir: 1)
        old.append([{"kind": "late"}, {"kind": "later"}])
    new.append([{"kind": "c"}])
    assert kinds(tmp_path) == ["a", "b", "c"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    term = acquire_term(tmp_path)
    one, other = Journal(tmp_path, term), Journal(tmp_path, term)
    one.append([{"kind": "a"}])
    with pytest.raises(FileExistsError):
        other.append([{"kind": "b"}])
    assert kinds(tmp_path) == ["a"]
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["000001-00000000.json"]


def test_an_term_is_given_once(tmp_path: Path) -> None:
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.append(acquire_term(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_events(tmp_path) == [] and newest_term(tmp_path) == 0
