"""Compaction of a journal: with failing calls and racing controllers every event is read once, and no past one writes.

Limits are tiny here, so a journal of some dozens of entries has merged histories.
"""

import gzip
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import JournalCorrupt, TermSuperseded
from orchestrator.storage.chain import BEGINNING, Event, list_names
from orchestrator.storage.chain_reader import ChainReader, has_journal, newest_term
from orchestrator.storage.compacted import state_from, state_to_bytes
from orchestrator.storage.compaction import compact
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal, events_after, read_events
from orchestrator.storage.objects import Objects
from orchestrator.storage.tasks import StorageTask, run_inline
from tests.support.journals import DUE, LIMITS, SeqFold, check_journal, compaction, started

SEEDS = range(40)


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts, and thousands of flushes take minutes."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Killed(BaseException):
    """The process ends in a storage call."""


class WatchedObjects:
    """A directory that counts calls, and runs `before` with the number and name of each, and `after` likewise."""

    def __init__(self, run_dir: Path) -> None:
        self._inner = DirectoryObjects(run_dir)
        self.calls: list[str] = []
        self.before: Callable[[int, str], None] = lambda number, name: None
        self.after: Callable[[int, str], None] = lambda number, name: None

    def create(self, key: str, data: bytes) -> bytes:
        return self._call("create", lambda: self._inner.create(key, data))

    def get(self, key: str) -> bytes:
        return self._call("get", lambda: self._inner.get(key))

    def names(self, folder: str) -> tuple[str, ...]:
        return self._call("names", lambda: self._inner.names(folder))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:  # one by one: a process may end between two
            self._call("delete", lambda key=key: self._inner.delete([key]))

    def _call(self, name: str, call: Callable[[], Any]) -> Any:
        number = len(self.calls)
        self.calls.append(name)
        self.before(number, name)
        result = call()
        self.after(number, name)
        return result


class Writer:
    """A controller's journal, and all events that were appended by any."""

    def __init__(self, run_dir: Path, written: list[Event]) -> None:
        self.run_dir, self.written = run_dir, written
        self.objects = WatchedObjects(run_dir)
        self.journal = Journal(self.objects)

    def append(self, count: int = 1) -> None:
        self.written += self.journal.append([{"kind": "step", "n": len(self.written) + i} for i in range(count)])

    def append_without_reply(self) -> None:
        """An append that storage carries out and reports as failed."""
        self.append()  # settles an earlier one

        def fails(number: int, name: str) -> None:
            raise OSError(5, "Input/output error")

        self.objects.after = fails
        with pytest.raises(OSError, match="Input/output"):
            self.append()
        self.objects.after = lambda number, name: None
        entry = json.loads(DirectoryObjects(self.run_dir).get(f"journal/{self.journal.last.number + 1:010d}"))
        self.written += entry["events"]

    def compaction(self) -> StorageTask[None]:
        return compaction(self.objects, self.journal.last)

    def compact(self) -> None:
        run_inline(self.compaction())

    def refuses(self) -> None:
        with pytest.raises(TermSuperseded):
            self.append()


def grown(run_dir: Path, entries: int) -> Writer:
    """A journal of so many entries, compacted as often as it is due."""
    writer = Writer(run_dir, [])
    for number in range(1, entries):
        writer.append()
        if number % DUE == 0:
            writer.compact()
    return writer


def check(run_dir: Path, written: Sequence[Event]) -> None:
    check_journal(DirectoryObjects(run_dir), written)


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "journal").iterdir())


def test_a_compacted_journal_reads_as_before(tmp_path: Path) -> None:
    writer = grown(tmp_path, 9)
    check(tmp_path, writer.written)
    assert names_in(tmp_path) == [
        "0000000000",  # the first of its term
        "0000000008",
        "history-0000000000-0000000003.gz",
        "history-0000000004-0000000007.gz",
        "state-0000000007",
    ]
    assert has_journal(DirectoryObjects(tmp_path)) and newest_term(DirectoryObjects(tmp_path)) == 1


def test_a_journal_without_entries_after_its_state_continues(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [])
    for _ in range(3):
        writer.append(2)
    writer.compact()
    assert names_in(tmp_path)[-1] == "state-0000000003"
    assert newest_term(DirectoryObjects(tmp_path)) == 1
    check(tmp_path, writer.written)
    successor = Writer(tmp_path, writer.written)
    assert (successor.journal.term, successor.journal.last.number) == (2, 4)
    successor.append()
    writer.refuses()
    check(tmp_path, successor.written)


def test_histories_stay_few(tmp_path: Path) -> None:
    writer = grown(tmp_path, 400)
    check(tmp_path, writer.written)
    histories = list_names(DirectoryObjects(tmp_path)).histories
    spans = [history.last - history.first + 1 for history in histories]
    assert spans == sorted(spans, reverse=True) and sum(spans) == 396
    assert set(spans) == {DUE, 2 * DUE, 4 * DUE} and spans.count(DUE) <= 4 and spans.count(2 * DUE) <= 4


def test_entries_are_compacted_by_size_too(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [])
    for _ in range(6):
        writer.append()
    sizes = [path.stat().st_size for path in sorted((tmp_path / "journal").iterdir())]
    limits = replace(LIMITS, entries=100, num_bytes=sum(sizes[:3]))
    assert run_inline(compact(writer.objects, writer.journal.last, SeqFold, limits)) == 2
    check(tmp_path, writer.written)


def test_a_journal_that_was_never_compacted_is_compacted_in_parts(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [])
    for _ in range(30):
        writer.append()
    found = [run_inline(compact(writer.objects, writer.journal.last, SeqFold, LIMITS)) for _ in range(10)]
    assert found == [3, 7, 11, 15, 19, 23, 27, 30, 30, 30]
    check(tmp_path, writer.written)


@pytest.mark.parametrize("num_entries", [40, 400])
def test_a_start_reads_few_objects(tmp_path: Path, num_entries: int) -> None:
    writer = grown(tmp_path, num_entries)
    objects = WatchedObjects(tmp_path)
    assert len(started(objects).seqs) == len(writer.written)
    assert objects.calls.count("names") == 1
    assert objects.calls.count("get") <= 1 + DUE
    objects = WatchedObjects(tmp_path)
    Journal(objects)
    assert len(objects.calls) <= 4


# -- past controllers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [1, 6])
def test_the_past_is_refused_after_compaction(tmp_path: Path, others: int) -> None:
    old = grown(tmp_path, 7)
    new = Writer(tmp_path, old.written)
    for _ in range(others):
        new.append()
    new.compact()
    new.compact()
    old.refuses()
    old.refuses()
    check(tmp_path, new.written)


def test_a_past_controller_whose_reply_was_lost_is_refused(tmp_path: Path) -> None:
    """It doesn't know of its last entry, and looks for a free number there."""
    old = grown(tmp_path, 6)
    old.append_without_reply()
    new = Writer(tmp_path, old.written)
    for _ in range(9):
        new.append()
    for _ in range(4):
        new.compact()
    assert list_names(DirectoryObjects(tmp_path)).newest_state > old.journal.last.number + 1
    for _ in range(3):
        old.refuses()
    check(tmp_path, new.written)


def test_a_controller_whose_reply_was_lost_continues_after_its_own_compaction(tmp_path: Path) -> None:
    writer = grown(tmp_path, 6)
    writer.append_without_reply()
    writer.compact()
    writer.append()
    check(tmp_path, writer.written)


@pytest.mark.parametrize("num_entries", [1, 3, 5])
def test_a_term_is_not_taken_at_a_number_that_was_freed(tmp_path: Path, num_entries: int) -> None:
    """A controller that stands still between its look for the newest entry and the creation of the next one."""
    live = grown(tmp_path, 6)
    objects = WatchedObjects(tmp_path)

    def meanwhile(number: int, name: str) -> None:
        if name == "create":
            objects.before = lambda number, name: None
            for _ in range(num_entries):
                live.append()
            for _ in range(3):
                live.compact()
            assert list_names(DirectoryObjects(tmp_path)).newest_state == live.journal.last.number

    objects.before = meanwhile
    late = Journal(objects)
    assert late.term == 2 and late.last.number == live.journal.last.number + 1
    live.refuses()
    check(tmp_path, live.written)
    live.written += late.append([{"kind": "step", "n": -1}])
    check(tmp_path, live.written)
    run_inline(compact(objects, late.last, SeqFold, LIMITS))
    kept = list_names(DirectoryObjects(tmp_path)).entries
    assert kept == (0, late.last.number - 1)  # the first of both terms: what was created at the freed number is gone


# -- faults ------------------------------------------------------------------------------------------------------------


def kills(when: str, at: int) -> Callable[[int, str], None]:
    def kill(number: int, name: str) -> None:
        if number == at:
            raise Killed

    return kill


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_call_of_a_compaction_loses_nothing(tmp_path: Path, when: str) -> None:
    """Also in a compaction that merges histories."""
    template = tmp_path / "template"
    template.mkdir()
    writer = grown(template, 5 * DUE + 1)
    for _ in range(DUE - 1):
        writer.append()
    for at in count():
        run_dir = shutil.copytree(template, tmp_path / f"{at}")
        written = list(writer.written)
        objects = WatchedObjects(run_dir)
        setattr(objects, when, kills(when, at))
        killed = False
        try:
            run_inline(compaction(objects, writer.journal.last))
        except Killed:
            killed = True
        check(run_dir, written)
        successor = Writer(run_dir, written)
        for _ in range(2 * DUE):
            successor.append()
            check(run_dir, written)
        for _ in range(4):
            successor.compact()
        check(run_dir, written)
        names = list_names(DirectoryObjects(run_dir))
        assert len(names.states) == 1 and len(names.contained()) == 0
        assert len(names.entries) <= 3
        if not killed:
            return
    raise AssertionError("no compaction came to its end")


@pytest.mark.parametrize("seed", SEEDS)
def test_every_event_is_present_once_after_any_fault(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    written: list[Event] = []
    writer, past = Writer(tmp_path, written), []
    for _ in range(120):
        match chance.choice(["append"] * 6 + ["compact"] * 3 + ["lost reply", "killed", "superseded", "past", "past"]):
            case "append":
                writer.append(chance.randint(1, 3))
            case "compact":
                writer.compact()
            case "lost reply":
                writer.append_without_reply()
            case "superseded":
                past.append(writer)
                writer = Writer(tmp_path, written)
            case "killed":
                setattr(writer.objects, chance.choice(["before", "after"]), _kill_by(chance))
                with suppress(Killed):
                    writer.compact()
                past.append(writer)
                writer = Writer(tmp_path, written)
            case "past" if past:
                old = chance.choice(past)
                old.objects.before = old.objects.after = lambda number, name: None
                if chance.random() < 0.3:
                    with suppress(OSError, JournalCorrupt):  # it may compact what it knows of, to no harm
                        old.compact()
                old.refuses()
    check(tmp_path, written)


def _kill_by(chance: random.Random) -> Callable[[int, str], None]:
    def kill(number: int, name: str) -> None:
        if chance.random() < 0.1:
            raise Killed

    return kill


@pytest.mark.parametrize("seed", SEEDS)
def test_controllers_that_compact_at_once_lose_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    old = grown(tmp_path, chance.randint(1, 40))
    for _ in range(chance.randint(0, 20)):
        old.append()
    if chance.random() < 0.5:
        old.append_without_reply()
    new = Writer(tmp_path, old.written)
    steps: dict[Writer, tuple[StorageTask[None], Any] | None] = {old: None, new: None}
    for _ in range(150):
        writer = chance.choice([old, new])
        if writer is new and chance.random() < 0.3:
            new.append()
        task, result = steps[writer] or (writer.compaction(), None)
        try:
            steps[writer] = (task, task.send(result)())
        except (StopIteration, OSError, JournalCorrupt):  # the other has removed what it was about to read
            steps[writer] = None
    old.refuses()
    check(tmp_path, new.written)
    for _ in range(20):
        new.compact()
    check(tmp_path, new.written)


# -- readers -----------------------------------------------------------------------------------------------------------


def read_forwards(objects: Objects) -> list[int]:
    return [event["seq"] for entry in ChainReader(objects).entries() for event in entry.events]


def read_backwards(objects: Objects) -> list[int]:
    return [event["seq"] for entry in ChainReader(objects).backwards() for event in entry.events][::-1]


def read_at_start(objects: Objects) -> list[int]:
    return started(objects).seqs


@pytest.mark.parametrize("reads", [read_forwards, read_backwards, read_at_start])
@pytest.mark.parametrize("rounds", [1, 8])
def test_a_reader_continues_while_the_journal_is_compacted(
    tmp_path: Path, reads: Callable[[Objects], list[int]], rounds: int
) -> None:
    template = tmp_path / "template"
    template.mkdir()
    grown(template, 5 * DUE)
    for at in count():
        run_dir = shutil.copytree(template, tmp_path / f"{at}")
        writer = Writer(run_dir, read_events(DirectoryObjects(run_dir)))
        for _ in range(3):
            writer.append()
        expected = [event["seq"] for event in writer.written]
        objects = WatchedObjects(run_dir)

        def meanwhile(number: int, name: str, writer: Writer = writer, at: int = at) -> None:
            if number == at:
                for _ in range(rounds):
                    for _ in range(DUE):
                        writer.append()
                    writer.compact()

        objects.before = meanwhile
        found = reads(objects)
        assert found[: len(expected)] == expected
        assert found == [event["seq"] for event in writer.written][: len(found)]
        if len(objects.calls) <= at:
            return


def test_readers_in_other_threads_see_a_prefix(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [])
    found: list[list[Event]] = []
    ends = threading.Event()

    def read() -> None:
        while not ends.is_set():
            found.append(list(events_after(DirectoryObjects(tmp_path))))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(150):
        writer.append()
        if number % DUE == 0:
            writer.compact()
    ends.set()
    for reader in readers:
        reader.join()
    assert len(found) >= 2 and all(events == writer.written[: len(events)] for events in found)


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def refused(run_dir: Path, words: str) -> None:
    """A start and a new controller are refused, and nothing is written."""
    before = {name: (run_dir / "journal" / name).read_bytes() for name in names_in(run_dir)}
    with pytest.raises(JournalCorrupt, match=words):
        started(DirectoryObjects(run_dir))
    with pytest.raises(JournalCorrupt, match=words):
        run_inline(compact(DirectoryObjects(run_dir), replace(BEGINNING, number=10**6), SeqFold, LIMITS))
    assert {name: (run_dir / "journal" / name).read_bytes() for name in names_in(run_dir)} == before


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, 6)
    damage(
        tmp_path / "journal" / "state-0000000003",
        lambda data: data.replace(b'"format":1', b'"format":2', 1),
    )
    refused(tmp_path, "journal/state-0000000003 is of format 2; this version reads format 1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"format":1}\n'])
def test_an_invalid_state_is_refused(tmp_path: Path, data: bytes) -> None:
    grown(tmp_path, 6)
    damage(tmp_path / "journal" / "state-0000000003", lambda _: data)
    refused(tmp_path, "journal/state-0000000003 can't be read")


def test_a_state_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, 6)
    damage(tmp_path / "journal" / "state-0000000003", lambda data: data[:-1])
    refused(tmp_path, "journal/state-0000000003 is not whole")


def test_a_state_of_another_entry_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, 6)
    path = tmp_path / "journal" / "state-0000000003"
    path.rename(path.with_name("state-0000000004"))
    refused(tmp_path, "journal/state-0000000004 is that of entry 3")


def test_a_state_that_the_next_entry_does_not_follow_is_refused(tmp_path: Path) -> None:
    grown(tmp_path, 6)

    def other(data: bytes) -> bytes:
        state = state_from(3, data)
        return state_to_bytes(replace(state, link=replace(state.link, digest="0" * 64)))

    damage(tmp_path / "journal" / "state-0000000003", other)
    refused(tmp_path, "journal/state-0000000003 is not the one that entry 4 follows")


def test_a_missing_history_names_its_entries(tmp_path: Path) -> None:
    grown(tmp_path, 14)
    (tmp_path / "journal" / "history-0000000004-0000000007.gz").unlink()
    words = "the history of journal entries 4 to 7 is missing"
    with pytest.raises(JournalCorrupt, match=words):
        read_events(DirectoryObjects(tmp_path))
    with pytest.raises(JournalCorrupt, match=words):
        list(ChainReader(DirectoryObjects(tmp_path)).backwards())
    assert len(started(DirectoryObjects(tmp_path)).seqs) == 13  # a start doesn't need it


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-9], "history-0000000004-0000000007.gz can't be read"),
        (lambda data: b"none", "history-0000000004-0000000007.gz can't be read"),
        (
            lambda data: gzip.compress(gzip.decompress(data)[:-40]),
            "entry 7 in .*history-0000000004-0000000007.gz can't",
        ),
        (
            lambda data: gzip.compress(gzip.decompress(data).replace(b'"n":4', b'"n":9')),
            "journal entry 5 in journal/history-0000000004-0000000007.gz is not the one that entry 6 follows",
        ),
        (
            lambda data: gzip.compress(b"\n".join(gzip.decompress(data).split(b"\n")[:3]) + b"\n"),
            "history-0000000004-0000000007.gz holds 3 entries",
        ),
    ],
    ids=["cut off", "no gzip", "half an entry", "changed", "too few"],
)
def test_a_damaged_history_is_named(tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    grown(tmp_path, 14)
    damage(tmp_path / "journal" / "history-0000000004-0000000007.gz", change)
    with pytest.raises(JournalCorrupt, match=words):
        read_events(DirectoryObjects(tmp_path))


def test_a_damaged_entry_is_not_compacted(tmp_path: Path) -> None:
    writer = grown(tmp_path, 6)
    for _ in range(3):
        writer.append()
    damage(tmp_path / "journal" / "0000000006", lambda data: data.replace(b'"n":5', b'"n":6'))
    before = names_in(tmp_path)
    with pytest.raises(JournalCorrupt, match="journal/0000000006 is not the one that entry 7 follows"):
        writer.compact()
    damage(tmp_path / "journal" / "0000000006", lambda data: data.replace(b'"n":6', b'"n":5'))
    damage(tmp_path / "journal" / "0000000008", lambda data: data.replace(b'"n":7', b'"n":8'))
    limits = replace(LIMITS, entries=10)
    with pytest.raises(JournalCorrupt, match="journal/0000000008 is not what was written"):
        run_inline(compact(writer.objects, writer.journal.last, SeqFold, limits))
    assert names_in(tmp_path) == before
