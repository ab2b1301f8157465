"""The journal's chain: one writer at a time, whatever the writers believe, and no entry that is not the next."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.chain import ChainEntry
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, has_journal, newest_term, read_events


class FailingObjects(DirectoryObjects):
    """A directory whose next `create` fails: before anything is stored, or after all of it is."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.failure = ""

    def create(self, key: str, data: bytes) -> bytes:
        failure, self.failure = self.failure, ""
        if failure == "before":
            raise OSError(28, "No space left on device")
        found = super().create(key, data)
        if failure == "after":
            raise OSError(5, "Input/output error")
        return found


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


class Controllers:
    """Controllers of one run, several of which may be alive: what each does, and what it may act on."""

    def __init__(self, root: Path) -> None:
        self.storage, self.kept = DirectoryObjects(root / "run"), DirectoryObjects(root / "kept")
        self.journals: list[Journal] = []
        self.open: list[list[ChainEntry]] = []  # of each, the entries that it has made and not stored, oldest first
        self.over: set[int] = set()  # those that know that they are superseded
        self.late: list[ChainEntry] = []  # that storage may still take, from calls of controllers that are gone
        self.acted: list[tuple[int, str]] = []  # term and event, in the order in which they were recorded

    def begin(self) -> None:
        self.journals.append(Journal(self.storage, kept=self.kept))
        self.open.append([])

    def decide(self, number: int) -> None:
        """Make an entry, behind those that storage hasn't taken."""
        if number not in self.over:
            name = f"{self.journals[number].term}-{self.journals[number].last.number}"
            self.open[number].append(self.journals[number].propose([{"kind": name}]))

    def store(self, number: int) -> None:
        """Storage takes the oldest entry of a controller."""
        if self.open[number]:
            entry = self.open[number][0]
            self._try(number, self.journals[number].store, entry)
            if entry in self.open[number]:
                self.open[number].remove(entry)

    def keep(self, number: int) -> None:
        """Storage hangs, and all entries of a controller are kept, in order."""
        for entry in tuple(self.open[number]):
            self._try(number, self.journals[number].keep, entry)

    def arrive(self) -> None:
        """The oldest call of a controller that is gone reaches storage."""
        if self.late:
            entry = self.late.pop(0)
            self.storage.create(f"journal/{entry.number:010d}", entry.data)

    def _try(self, number: int, record: Callable[[ChainEntry], None], entry: ChainEntry) -> None:
        if entry not in self.open[number]:  # superseded
            return
        try:
            record(entry)
        except TermSuperseded:
            self.late += self.open[number][:1]  # one at a time is on its way
            self.open[number] = []
            self.over.add(number)
        else:
            event = (entry.link.term, entry.events[0]["kind"])
            if event not in self.acted:
                self.acted.append(event)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(st.tuples(st.sampled_from(["begin", "decide", "store", "keep", "arrive"]), st.integers(0, 3))),
)
def test_what_any_controller_acted_on_is_in_the_journal_whatever_storage_did(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]
) -> None:
    """Controllers decide, have entries stored or kept, and are replaced, also while they live, in any order."""
    run = Controllers(tmp_path_factory.mktemp("run"))
    run.begin()
    run.store(0)
    for move, number in moves:
        if move == "begin":
            run.begin()
        elif move == "arrive":
            run.arrive()
        else:
            getattr(run, move)(number % len(run.journals))
    run.begin()
    while run.late:
        run.arrive()
    events = [(event["term"], event["kind"]) for event in read_events(run.storage._root)]
    assert [event for event in events if event in run.acted] == sorted(run.acted, key=events.index)
    assert set(run.acted) <= set(events) and len(set(events)) == len(events)
    assert [term for term, _ in events] == sorted(term for term, _ in events)


def test_another_run_of_the_name_gets_nothing_of_what_was_kept(tmp_path: Path) -> None:
    kept = DirectoryObjects(tmp_path / "kept")
    old = Journal(DirectoryObjects(tmp_path / "old"), kept=kept)
    old.keep(old.propose([{"kind": "kept"}]))
    Journal(DirectoryObjects(tmp_path / "new"), kept=kept)
    assert kinds(tmp_path / "new") == []
    Journal(DirectoryObjects(tmp_path / "old"), kept=kept)
    assert kinds(tmp_path / "old") == ["kept"]
