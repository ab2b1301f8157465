"""The journal's chain: one writer at a time, whatever the writers believe, and no entry that is not the next."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.chain import ChainEntry, Holder
from orchestrator.storage.chain_reader import has_journal, newest_holder, newest_term
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, read_events
from orchestrator.storage.objects import Objects
from tests.support.storages import CEPH, MakeStorage, storage_of


@pytest.fixture(scope="module", params=["directory", "fuse", "s3", CEPH])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeStorage]:
    with storage_of(request.param, tmp_path_factory.mktemp(request.param) / "at") as make:
        yield make


@pytest.fixture
def objects(make: MakeStorage) -> Objects:
    return make()


class FailingObjects:
    """Objects whose next `create` fails: before anything is stored, or after all of it is."""

    def __init__(self, inner: Objects) -> None:
        self._inner = inner
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


def kinds(objects: Objects, after: int = -1) -> list[str]:
    return [event["kind"] for event in read_events(objects, after)]


def damage(objects: Objects, key: str, data: bytes) -> None:
    objects.delete([key])
    objects.create(key, data)


def test_events_are_read_in_the_order_they_were_written(objects: Objects) -> None:
    journal = Journal(objects)
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    assert journal.append([]) == []
    assert kinds(objects) == ["a", "b", "c"]
    assert [event["seq"] for event in read_events(objects)] == [0, 1, 2]
    assert objects.names("journal") == tuple(f"{n:010d}" for n in range(3))


@pytest.mark.parametrize(("after", "expected"), [(-1, "abc"), (0, "bc"), (1, "c"), (2, ""), (9, "")])
def test_reading_after_an_event(objects: Objects, after: int, expected: str) -> None:
    journal = Journal(objects)
    journal.append([{"kind": "a"}, {"kind": "b"}])
    journal.append([{"kind": "c"}])
    assert "".join(kinds(objects, after)) == expected


def test_an_event_can_not_forge_its_number(objects: Objects) -> None:
    journal = Journal(objects)
    journal.append([{"kind": "a"}])
    (event,) = journal.append([{"kind": "b", "seq": 0, "term": 9}])
    assert (event["seq"], event["term"]) == (1, 1)
    assert kinds(objects) == ["a", "b"]


def test_a_successor_continues_and_the_past_is_refused(objects: Objects) -> None:
    old = Journal(objects)
    old.append([{"kind": "a"}])
    new = Journal(objects)
    for _ in range(2):
        with pytest.raises(TermSuperseded, match="term 1 may not write to the journal: entry .* is of term 2"):
            old.append([{"kind": "late"}])
    new.append([{"kind": "b"}])
    with pytest.raises(TermSuperseded):
        old.append([{"kind": "later"}])
    assert kinds(objects) == ["a", "b"]
    assert (old.term, new.term, newest_term(objects)) == (1, 2, 2)


def test_another_cluster_takes_over_only_on_request(objects: Objects) -> None:
    here, there = Holder("here pid 1", "one"), Holder("there pid 2", "two")
    old = Journal(objects, here, followed=0)  # the first term of all is anybody's
    old.append([{"kind": "a"}])
    assert newest_holder(objects) == here
    before = objects.names("journal")
    with pytest.raises(TermSuperseded, match="another cluster's controller: entry 1 is of term 1, of here pid 1"):
        Journal(objects, there, followed=0)
    assert objects.names("journal") == before
    assert Journal(objects, Holder("here pid 3", "one"), followed=0).term == 2
    new = Journal(objects, there)
    with pytest.raises(TermSuperseded, match="term 1 .* is of term 2, of here pid 3") as refused:
        old.append([{"kind": "late"}])
    assert refused.value.cluster == "one"
    new.append([{"kind": "b"}])
    with pytest.raises(TermSuperseded) as refused:
        Journal(objects, here, followed=2)
    assert refused.value.cluster == "two" and newest_holder(objects) == there
    assert Journal(objects, here, followed=3).term == 4


def test_a_restarted_controller_loses_the_race_with_another_cluster(tmp_path: Path) -> None:
    class Late(DirectoryObjects):
        """A directory in which another cluster takes a term before the first creation."""

        has_lost = False

        def create(self, key: str, data: bytes) -> bytes:
            if not self.has_lost:
                self.has_lost = True
                Journal(DirectoryObjects(tmp_path), Holder("there", "two"))
            return super().create(key, data)

    Journal(DirectoryObjects(tmp_path), Holder("here", "one"))
    with pytest.raises(TermSuperseded):
        Journal(Late(tmp_path), Holder("here", "one"), followed=0)
    assert newest_holder(DirectoryObjects(tmp_path)).cluster == "two"


def test_a_term_is_given_once(objects: Objects) -> None:
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.append(Journal(objects).term)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


@pytest.mark.parametrize("failure", ["before", "after"])
def test_an_append_that_failed_may_be_repeated(objects: Objects, failure: str) -> None:
    """Whether the failed entry was stored or not, the journal goes on behind it."""
    failing = FailingObjects(objects)
    journal = Journal(failing)
    journal.append([{"kind": "a"}])
    failing.failure = failure
    with pytest.raises(OSError, match="No space|Input/output"):
        journal.append([{"kind": "b"}])
    (event,) = journal.append([{"kind": "c"}])
    assert kinds(objects) == (["a", "c"] if failure == "before" else ["a", "b", "c"])
    assert event["seq"] == len(kinds(objects)) - 1


def test_a_failed_append_does_not_hide_a_successor(objects: Objects) -> None:
    failing = FailingObjects(objects)
    old = Journal(failing)
    failing.failure = "before"
    with pytest.raises(OSError, match="No space"):
        old.append([{"kind": "a"}])
    Journal(objects).append([{"kind": "b"}])
    with pytest.raises(TermSuperseded):
        old.append([{"kind": "c"}])
    assert kinds(objects) == ["b"]


def test_no_journal_is_an_empty_one(objects: Objects) -> None:
    assert read_events(objects) == [] and newest_term(objects) == 0 and not has_journal(objects)


def test_a_missing_entry_is_named(objects: Objects) -> None:
    journal = Journal(objects)
    for kind in "abc":
        journal.append([{"kind": kind}])
    objects.delete(["journal/0000000002"])
    with pytest.raises(JournalCorrupt, match="journal/0000000002 is missing"):
        read_events(objects)
    assert kinds(objects, after=1) == ["c"]  # what is read is whole


def test_a_changed_entry_is_named(objects: Objects) -> None:
    journal = Journal(objects)
    for kind in "abc":
        journal.append([{"kind": kind}])
    damage(objects, "journal/0000000002", objects.get("journal/0000000002").replace(b'"b"', b'"x"'))
    with pytest.raises(JournalCorrupt, match="journal/0000000002 is not the one that entry 3 follows"):
        read_events(objects)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", json.dumps({"term": 1}).encode()])
def test_an_invalid_entry_is_named(objects: Objects, data: bytes) -> None:
    Journal(objects)
    damage(objects, "journal/0000000000", data)
    with pytest.raises(JournalCorrupt, match="journal/0000000000 can't be read"):
        newest_term(objects)
    with pytest.raises(JournalCorrupt, match="journal/0000000000 can't be read"):
        Journal(objects)


class Controllers:
    """Controllers of one run, several of which may be alive: what each does, and what it may act on."""

    def __init__(self, make: MakeStorage) -> None:
        self.storage, self.kept = make(), make()
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


MOVES = st.lists(st.tuples(st.sampled_from(["begin", "decide", "store", "keep", "arrive"]), st.integers(0, 3)))


@settings(max_examples=300)
@given(moves=MOVES)
def test_the_journal_has_every_decision_that_any_controller_acted_on_after_any_fault(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]
) -> None:
    """Controllers decide, have entries stored or kept, and are replaced, also while they live, in any order."""
    act(lambda: DirectoryObjects(tmp_path_factory.mktemp("run")), moves)


def test_the_same_in_a_bucket(tmp_path: Path) -> None:
    @settings(max_examples=30, phases=[Phase.generate], database=None)
    @given(moves=MOVES)
    def acts(moves: list[tuple[str, int]]) -> None:
        act(make, moves)

    with storage_of("s3", tmp_path) as make:
        acts()


def act(make: MakeStorage, moves: list[tuple[str, int]]) -> None:
    run = Controllers(make)
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
    events = [(event["term"], event["kind"]) for event in read_events(run.storage)]
    assert [event for event in events if event in run.acted] == sorted(run.acted, key=events.index)
    assert set(run.acted) <= set(events) and len(set(events)) == len(events)
    assert [term for term, _ in events] == sorted(term for term, _ in events)


def test_another_run_of_the_name_gets_nothing_of_what_was_kept(make: MakeStorage) -> None:
    first, second, kept = make(), make(), make()
    old = Journal(first, kept=kept)
    old.keep(old.propose([{"kind": "kept"}]))
    Journal(second, kept=kept)
    assert kinds(second) == []
    Journal(first, kept=kept)
    assert kinds(first) == ["kept"]
