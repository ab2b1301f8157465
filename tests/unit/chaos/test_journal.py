"""The chaos suite's own reader of journals: reads what the product writes, and finds what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.chain import Event as ProductEvent
from orchestrator.storage.compaction import CompactionLimits, compact
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, read_events
from orchestrator.storage.tasks import run_inline
from tests.chaos.journal import Follower, whole_chain


class _Counted:
    """A fold that counts events."""

    def __init__(self, stored: bytes | None) -> None:
        self._count = 0 if stored is None else int(stored)

    def take(self, events: Any) -> None:
        self._count += len(events)

    def stored(self) -> bytes:
        return str(self._count).encode()


def _write(run_dir: Path, terms: int = 2, entries: int = 3) -> Journal:
    for _ in range(terms):
        journal = Journal(DirectoryObjects(run_dir))
        for number in range(entries):
            journal.append([{"kind": "counted", "number": number}, {"kind": "counted", "number": number}])
    return journal


def _compact(run_dir: Path, journal: Journal, entries: int = 3) -> None:
    limits = CompactionLimits(entries=entries, merged=2)
    run_inline(compact(DirectoryObjects(run_dir), journal.last, _Counted, limits))


def test_the_product_s_journal_is_read_as_the_product_reads_it(tmp_path: Path) -> None:
    _write(tmp_path)
    chain = whole_chain(tmp_path)
    expected: list[ProductEvent] = read_events(objects_at(tmp_path))
    assert (chain.faults, chain.number, chain.term) == ([], 7, 2) and chain.events == expected


def test_a_compacted_journal_is_read_whole(tmp_path: Path) -> None:
    journal = _write(tmp_path)
    before = whole_chain(tmp_path)
    _compact(tmp_path, journal)
    assert len(list((tmp_path / "journal").glob("history-*"))) == 1
    assert not (tmp_path / "journal" / f"{1:010d}").exists()
    assert whole_chain(tmp_path) == before


def test_a_follower_reads_on_through_compactions(tmp_path: Path) -> None:
    journal = _write(tmp_path)
    follower = Follower(tmp_path)
    follower.look()
    journal = _write(tmp_path)
    for _ in range(2):
        _compact(tmp_path, journal)
    follower.look()
    assert follower.chain.faults == [] and follower.chain.events == read_events(objects_at(tmp_path))


def _change(number: int, **changes: Any) -> Callable[[Path], None]:
    def change(journal: Path) -> None:
        path = journal / f"{number:010d}"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))

    return change


def _change_event(journal: Path) -> None:
    path = journal / f"{2:010d}"
    path.write_text(path.read_text().replace('"number":1', '"number":8'))


def _remove(journal: Path) -> None:
    (journal / f"{3:010d}").unlink()


def _cut(journal: Path) -> None:
    path = journal / f"{3:010d}"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("doctor", "fault"),
    [
        (_change_event, "journal entry 3 follows"),
        (_change(5, prev="0" * 64), "journal entry 5 follows 000000000000"),
        (_change(7, term=1), "journal entry 7 is of term 1, after term 2"),
        (_change(7, term=3), "journal entry 7 has events of term 3, which was not taken"),
        (_change(4, term=1), "journal entry 4 takes term 1 again"),
        (_change(7, seq=3), "journal entry 7 begins with event 3, not 10"),
        (_remove, "journal entry 3 is missing, and 7 is there"),
        (_cut, "journal entry 3 can't be read"),
    ],
)
def test_a_doctored_journal_is_found(
    tmp_path: Path, doctor: Callable[[Path], None], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chaos.journal.LOOK_AGAIN_S", 0.0)
    _write(tmp_path)
    doctor(tmp_path / "journal")
    assert any(found.startswith(fault) for found in whole_chain(tmp_path).faults), whole_chain(tmp_path).faults


def test_a_state_of_another_history_is_found(tmp_path: Path) -> None:
    journal = _write(tmp_path)
    _compact(tmp_path, journal)
    (state,) = (tmp_path / "journal").glob("state-*")
    head, _, fold = state.read_bytes().partition(b"\n")
    state.write_bytes(json.dumps(json.loads(head) | {"next_seq": 99}).encode() + b"\n" + fold)
    (fault,) = whole_chain(tmp_path).faults
    assert "has next_seq 99, not" in fault
