"""Compaction of a run's journal by its controller: a successor knows the same, and the run never notices a failure."""

import errno
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import JournalCorrupt
from orchestrator.policy.state.progress import RECENT_STEPS, Progress, absorb
from orchestrator.policy.state.requests import resumed
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.notices import (
    ExpertsCollapsed,
    GradientSaturated,
    LoadsSwing,
    NumericsDiffer,
    NumericsRecorded,
    StorageFails,
    StorageWorks,
)
from orchestrator.protocol.events.run import Ended, Submitted
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.run_records import journal_compactor
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.rollback import progress_up_to
from orchestrator.run_records.run_history import RunHistory, committed_steps, read_entries, read_steps
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.chain import list_names
from orchestrator.storage.compaction import CompactionLimits
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import read_events
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import Life, limits_of, record

LIMITS = limits_of(steps=100_000)
COMPACTION = CompactionLimits(entries=8, num_bytes=2**20, merged=2)
FINGERPRINT = {"torch": "2.9", "cpu": {"model": "x", "threads": 2}}


@pytest.fixture(autouse=True)
def _unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts, and thousands of flushes take minutes."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def opened(run_dir: Path) -> JournaledRun:
    return JournaledRun(run_dir, LIMITS, compaction=COMPACTION)


def compact(memory: JournaledRun) -> int:
    """Compact until nothing is due. Returns the number of storage calls."""
    calls = 0
    while memory.compactor.is_due():
        run_inline(memory.compactor.advance())
        calls += 1
    return calls


def known(history: RunHistory) -> dict[str, Any]:
    """All that a history holds."""
    left_out = ("_run_dir", "_objects", "compacted")
    return {name: value for name, value in vars(history).items() if name not in left_out}


def replayed(run_dir: Path) -> RunHistory:
    """The history by all events, whatever states are there."""
    history = RunHistory(run_dir, LIMITS, is_read=False)
    history.take(read_events(objects_at(run_dir)))
    return history


def absorb_steps(memory: JournaledRun, num_steps: int, chance: random.Random | None = None) -> None:
    first = memory.progress.watermark + 1
    records = []
    for step in range(first, first + num_steps):
        is_validated = chance is not None and chance.random() < 0.2
        was_applied = chance is None or chance.random() < 0.9
        records.append(
            record(
                step,
                validation_loss=3.0 + step if is_validated else None,
                applied=was_applied,
                grad_norm=1.0 if was_applied else float("inf"),
                tokens=100 + step,
                stage="easy" if step < 30 else "all",
            )
        )
    run_inline(memory.absorb(records, up_to=10**9))


def go_back(memory: JournaledRun, step: int, token: str) -> None:
    order = ResumeRequest(token, Restore(step, f"/c/{step}") if step >= 0 else None)
    decision = resumed(LIMITS, memory.state, order)
    events = [action for action in decision.actions if isinstance(action, Event)]
    run_inline(memory.decided(decision.state, events))


def some_event(chance: random.Random, memory: JournaledRun) -> Event:
    step = memory.progress.watermark
    events: Sequence[Event] = (
        Submitted("run", 2),
        NumericsRecorded(FINGERPRINT),
        NumericsDiffer("w1", {"cpu": "another"}),
        GradientSaturated("w0", step, ("head",)),
        ExpertsCollapsed(step, 1, 3.5),
        LoadsSwing(step, 0.5),
        StorageFails(StorageCondition.FULL, "full"),
        StorageWorks(),
        Ended("paused", "paused"),
    )
    return chance.choice(events)


@pytest.mark.parametrize("seed", range(8))
def test_a_compacted_journal_gives_the_same_history(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    life = Life(LIMITS)
    memory = opened(tmp_path)
    run_inline(memory.prepared(PreparedData("/store", 300, "/tokenizer.json")))
    for number in range(100):
        match chance.choice(["steps"] * 4 + ["state", "event", "back", "compact", "controller"]):
            case "steps":
                absorb_steps(memory, chance.randint(1, 40), chance)
            case "state":
                life.tick()
                run_inline(memory.decided(replace(life.state, seq=number), []))
            case "event":
                run_inline(memory.note(some_event(chance, memory)))
            case "back":
                go_back(memory, chance.randint(-1, max(memory.progress.watermark, -1)), f"token {number}")
            case "compact":
                compact(memory)
            case "controller":
                memory = opened(tmp_path)
        if number % 20 == 0:
            assert known(RunHistory(tmp_path, LIMITS)) == known(replayed(tmp_path))
    compact(memory)
    read = RunHistory(tmp_path, LIMITS)
    assert read.compacted > 0
    assert known(read) == known(replayed(tmp_path))
    assert (read.state, read.progress, read.data) == (memory.state, memory.progress, memory.data)
    assert read.progress.recent == tuple(read_steps(tmp_path)[-RECENT_STEPS:])
    assert list(read.progress.validations) == [
        (r.step, r.validation_loss) for r in read_steps(tmp_path) if r.validation_loss is not None
    ]


def test_progress_up_to_a_step_is_that_of_its_steps(tmp_path: Path) -> None:
    chance = random.Random(1)
    memory = opened(tmp_path)
    for _ in range(30):
        absorb_steps(memory, 40, chance)
    go_back(memory, 700, "first")
    for _ in range(20):
        absorb_steps(memory, 3, chance)
    compact(memory)
    newest = memory.progress.watermark
    assert newest == 760
    for step in (-1, 0, 5, 100, 511, 512, 650, 700, 701, newest - 1, newest, newest + 9):
        steps = [record for record in read_steps(tmp_path) if record.step <= step]
        assert progress_up_to(DirectoryObjects(tmp_path), memory.progress, step) == absorb(Progress(), steps)


def test_progress_before_an_event_is_that_of_the_events_before_it(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    for _ in range(10):
        absorb_steps(memory, 3)
    seq, then = read_events(objects_at(tmp_path))[-1]["seq"] + 1, memory.progress
    for _ in range(10):
        absorb_steps(memory, 3)
    compact(memory)
    before = [entry for entry in read_entries(tmp_path) if entry.seq < seq]
    expected = absorb(Progress(), [record for record in committed_steps(before) if record.step <= 12])
    assert progress_up_to(DirectoryObjects(tmp_path), then, 12, before=seq) == expected


def test_a_compaction_makes_one_storage_call_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(tmp_path)
    for _ in range(6):
        absorb_steps(memory, 1)
    assert not memory.compactor.is_due()
    absorb_steps(memory, 1)
    assert memory.compactor.is_due()
    writes = []
    for name in ("create", "delete"):
        whole = getattr(DirectoryObjects, name)
        monkeypatch.setattr(
            DirectoryObjects, name, lambda *args, whole=whole, name=name: (writes.append(name), whole(*args))[1]
        )
    most = 0
    while memory.compactor.is_due():
        before = len(writes)
        run_inline(memory.compactor.advance())
        most = max(most, len(writes) - before)
        if len(writes) < 20:
            absorb_steps(memory, 1)  # other tasks go between
    assert most == 1
    assert [r.step for r in read_steps(tmp_path)] == list(range(memory.progress.watermark + 1))
    assert known(RunHistory(tmp_path, LIMITS)) == known(replayed(tmp_path))


@pytest.mark.parametrize("at", range(25))
def test_a_failed_compaction_changes_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(journal_compactor.time, "monotonic", lambda: now_s[0])
    memory = opened(tmp_path)
    for _ in range(4 * 8):
        absorb_steps(memory, 1)
    expected = read_events(objects_at(tmp_path))
    calls = [0]

    def counted(name: str) -> None:
        whole = getattr(DirectoryObjects, name)

        def call(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at + 1:
                raise OSError(errno.EIO, "Input/output error")
            return whole(*args)

        monkeypatch.setattr(DirectoryObjects, name, call)

    for name in ("create", "get", "names", "delete"):
        counted(name)
    compact(memory)
    monkeypatch.undo()
    monkeypatch.setattr(journal_compactor.time, "monotonic", lambda: now_s[0])
    assert read_events(objects_at(tmp_path)) == expected and memory.trouble is None
    now_s[0] += journal_compactor.COMPACT_AGAIN_S
    compact(memory)
    assert not memory.compactor.is_due()
    absorb_steps(memory, 1)
    assert known(RunHistory(tmp_path, LIMITS)) == known(replayed(tmp_path))
    assert len(list_names(DirectoryObjects(tmp_path)).entries) <= 1 + 8 + 1


def full_while(monkeypatch: pytest.MonkeyPatch, is_full: Any) -> list[str]:
    """Storage that refuses new objects while `is_full` holds. Returns the keys that it refused."""
    create, refused = DirectoryObjects.create, list[str]()

    def create_if_there_is_room(objects: DirectoryObjects, key: str, data: bytes) -> bytes:
        if is_full():
            refused.append(key)
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(objects, key, data)

    monkeypatch.setattr(DirectoryObjects, "create", create_if_there_is_room)
    return refused


def test_a_full_disk_is_compacted_in_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(tmp_path)
    for _ in range(9):
        absorb_steps(memory, 1)
    expected = read_events(objects_at(tmp_path))
    refused = full_while(monkeypatch, (tmp_path / ".reserve").exists)
    compact(memory)
    assert len(refused) == 1
    assert list_names(DirectoryObjects(tmp_path)).newest_state >= 7
    assert read_events(objects_at(tmp_path)) == expected


def test_a_full_disk_without_a_reserve_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(tmp_path)
    for _ in range(9):
        absorb_steps(memory, 1)
    expected = read_events(objects_at(tmp_path))
    with monkeypatch.context() as full:
        assert full_while(full, lambda: True) == []
        compact(memory)
        assert not memory.compactor.is_due()  # for a while
    assert list_names(DirectoryObjects(tmp_path)).states == () and read_events(objects_at(tmp_path)) == expected
    absorb_steps(memory, 1)
    memory.compactor._again_s = 0.0
    compact(memory)
    assert list_names(DirectoryObjects(tmp_path)).newest_state >= 7
    assert read_events(objects_at(tmp_path))[: len(expected)] == expected


def test_a_large_state_makes_a_compaction_due(tmp_path: Path) -> None:
    memory = JournaledRun(tmp_path, LIMITS, compaction=replace(COMPACTION, entries=1000, num_bytes=5000))
    while not memory.compactor.is_due():
        absorb_steps(memory, 3)
    assert 3 < memory._journal.last.number < 100
    compact(memory)
    assert not memory.compactor.is_due()
    assert known(RunHistory(tmp_path, LIMITS)) == known(replayed(tmp_path))


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    memory = opened(tmp_path)
    for _ in range(9):
        absorb_steps(memory, 1)
    fold = RunHistory(tmp_path, LIMITS).stored()
    with pytest.MonkeyPatch.context() as other:
        other.setattr(RunHistory, "stored", lambda self: fold.replace(b'"resumed_by"', b'"resumed"'))
        compact(memory)
    (path,) = (tmp_path / "journal").glob("state-*")
    with pytest.raises(JournalCorrupt, match=rf"journal/{path.name} can't be read: .*no field resumed"):
        RunHistory(tmp_path, LIMITS)
    assert [r.step for r in read_steps(tmp_path)] == list(range(9))


def test_a_start_after_a_run_of_many_controllers_reads_one_state(tmp_path: Path) -> None:
    for _ in range(30):
        memory = opened(tmp_path)
        absorb_steps(memory, 2)
        compact(memory)
    names = list_names(DirectoryObjects(tmp_path))
    assert len(names.states) == 1 and names.newest - names.newest_state <= 8
    assert RunHistory(tmp_path, LIMITS).progress.watermark == 59
