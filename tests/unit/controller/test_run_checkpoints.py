"""Commits, deletions and searches of checkpoints, while storage takes entries of the journal late, or not at all."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import MANIFEST_FILE, checkpoint_name
from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import Lane, StorageThread
from orchestrator.controller.journal_writer import JournalWriter
from orchestrator.controller.run_checkpoints import MOST_COMMITS, RunCheckpoints
from orchestrator.controller.startup import OpenedRun
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.errors import TermSuperseded
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Commit, Observation, RunState
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.run import Queued
from orchestrator.protocol.events.training import CheckpointsDeleted
from orchestrator.protocol.messages import GenerationPlan, Restore, StoreAddress
from orchestrator.run_records.checkpoints.completion import commit_checkpoint
from orchestrator.run_records.checkpoints.search import DIRECTORY
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import RunHistory, user_events
from orchestrator.spec.job import JobSpec
from orchestrator.storage.journal import Journal
from orchestrator.storage.tasks import StorageTask, run_inline
from tests.support.checkpoints import write_shard
from tests.support.disk import small_disk
from tests.support.held_objects import HeldObjects

JOB = JobSpec.model_validate({"name": "run", "checkpoint": {"keep_last": 2}})
LIMITS = RunLimits.of("run", JOB)
MB = 2**20


class Scene:
    """A controller's part for checkpoints, with a journal whose storage can be held."""

    def __init__(self, root: Path) -> None:
        self.run_dir, self.storage = root / "run", HeldObjects(root / "run")
        self.run_dir.mkdir(exist_ok=True)
        cluster = HeldObjects(root / "cluster")
        self.cluster, self.journal = cluster, Journal(self.storage, kept=cluster)
        self.run = JournaledRun(self.run_dir, LIMITS, self.journal)
        self.inbox = Inbox()
        self.run.writer = JournalWriter(self.run, self.inbox)
        self.thread = StorageThread(self.inbox)
        opened = OpenedRun("run", self.run_dir, JOB, LIMITS, self.run)
        self.checkpoints = RunCheckpoints(opened, self.thread, self.inbox, self.note)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60.0
        self.thread.advance()
        while not condition():
            assert time.monotonic() < deadline_s
            with suppress(Empty):
                self.inbox.get(timeout=0.02)
            self.thread.advance()

    def note(self, event: Event, stored: bool = False) -> StorageTask[None]:
        yield from self.run.note(event, stored)

    def shard(self, step: int, generation: int = 0, megabytes: float = 0.01) -> Commit:
        size = int(megabytes * MB) // 4
        piece = ShardPiece("w", 0, size, np.full(size, step, np.float32))
        shard = write_shard(self.run_dir / DIRECTORY, [piece], step=step, term=1, generation=generation, rank=0)
        return Commit(step, 1, generation, (shard,))

    def commit(self, action: Commit) -> None:
        self.checkpoints.commit(action)

    def complete(self, *steps: int, megabytes: float = 0.01) -> None:
        for step in steps:
            self.commit(self.shard(step, megabytes=megabytes))
            self.until(self.is_idle)

    def decide(self, state: RunState, *events: Event) -> None:
        """In the lane of decisions, as the controller does it."""

        def turn() -> StorageTask[None]:
            yield from self.run.decided(state, events)

        self.thread.add("turn", turn, Lane.DECISIONS)

    def go_back(self, step: int) -> None:
        state = replace(self.run.state, checkpoint_done=step, checkpoint_generation=0, num_generations=1)
        self.decide(state, RolledBack(step, None, "a loss"))

    def observe(self) -> Observation:
        """There are no workers."""
        state, progress = self.run.state, self.run.progress
        return Observation(term=1, now_s=0.0, target=state.target, progress=progress)

    def leave_generation(self) -> None:
        """Generation 0 is no longer any that the run trains in, or has just left."""
        self.decide(replace(self.run.state, num_generations=1))
        self.until(lambda: self.run.state.num_generations == 1 and self.run.is_stored)

    def make_room(self) -> None:
        self.checkpoints.make_room(self.observe)
        self.until(self.is_idle)

    def is_idle(self) -> bool:
        names = ("retention", "room", "garbage", "set aside")
        return not any(map(self.thread.is_pending, names)) and not self.checkpoints._under_way()

    def go_on_once_kept(self) -> None:
        """Go on once the cluster keeps all entries, as a decision follows, for as long as a deletion would take."""
        next(self.run.note(Queued("decided")))
        prefix = f"{self.journal.last.number:010d}-"
        self.until(lambda: any(name.startswith(prefix) for name in self.cluster.names("journal")))
        for _ in range(20):
            self.thread.advance()
            time.sleep(0.01)

    def steps(self) -> list[int]:
        return [record.step for record in self.run.checkpoints.current]

    def has_manifest(self, step: int) -> bool:
        return (self.run_dir / DIRECTORY / checkpoint_name(step, 1, 0) / MANIFEST_FILE).exists()


def test_nothing_is_deleted_before_storage_has_the_checkpoint_after_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10, 20)
    with scene.storage.hanging():
        scene.commit(scene.shard(30))
        scene.until(lambda: scene.has_manifest(30) and scene.run.writer is not None and not scene.run.is_stored)
        scene.go_on_once_kept()
        assert scene.steps() == [10, 20] and scene.has_manifest(10)
        assert scene.checkpoints.newest == (0, 20)
    scene.until(scene.is_idle)
    assert scene.steps() == [20, 30] and not scene.has_manifest(10)
    assert RunHistory(scene.run_dir, LIMITS).checkpoints == scene.run.checkpoints


def test_nothing_is_deleted_before_storage_has_its_journal_entry(tmp_path: Path) -> None:
    past = Scene(tmp_path)
    past.complete(10, 20)
    run_inline(past.run.note(commit_checkpoint("run", past.run_dir, past.shard(30))))
    scene = Scene(tmp_path)
    with scene.storage.hanging():
        scene.until(lambda: not scene.run.is_stored)  # it has decided what to delete
        scene.go_on_once_kept()
        assert scene.steps() == [10, 20, 30] and scene.has_manifest(10)
    scene.until(scene.is_idle)
    assert scene.steps() == [20, 30] and not scene.has_manifest(10)


def test_a_commit_that_is_decided_again_is_journalled_once(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    action = scene.shard(10)
    for _ in range(3):
        scene.commit(action)
        scene.until(scene.is_idle)
    assert [event["kind"] for event in user_events(scene.run_dir)].count("checkpoint") == 1


def test_the_run_does_not_go_back_past_a_checkpoint_that_is_being_completed(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10)
    with scene.storage.hanging():
        scene.commit(scene.shard(15))
        scene.until(lambda: scene.has_manifest(15) and not scene.run.is_stored)
        scene.decide(replace(scene.run.state, wants_restore=True))
        scene.until(lambda: scene.run.state.wants_restore)
        scene.checkpoints.search()
        scene.until(lambda: not scene.thread.is_pending("search"))
        assert scene.checkpoints.is_searching
    scene.until(scene.is_idle)
    scene.checkpoints.search()
    scene.until(lambda: not scene.checkpoints.is_searching)
    assert scene.checkpoints.restorable is not None and scene.checkpoints.restorable.step == 15


def test_a_checkpoint_that_the_run_went_back_behind_meanwhile_is_set_aside(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10)
    with scene.storage.hanging():
        scene.commit(scene.shard(20))
        scene.until(lambda: scene.has_manifest(20) and not scene.run.is_stored)
        scene.go_back(10)
        scene.until(lambda: scene.run.checkpoints.first_generation == 1)
    scene.until(lambda: scene.is_idle() and scene.run.is_stored)
    assert scene.steps() == [10] and [record.step for record in scene.run.checkpoints.set_aside] == [20]
    assert RunHistory(scene.run_dir, LIMITS).checkpoints == scene.run.checkpoints
    assert scene.checkpoints.newest == (0, 10)


def test_while_a_checkpoint_is_to_be_restored_none_is_deleted(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10, 20)
    scene.decide(replace(scene.run.state, wants_restore=True))
    scene.until(lambda: scene.run.state.wants_restore)
    scene.complete(30)
    assert scene.steps() == [10, 20, 30]
    scene.decide(replace(scene.run.state, wants_restore=False, restore=Restore(30, "step-30")))
    scene.until(lambda: not scene.run.state.wants_restore)
    scene.checkpoints.search()  # as before each decision
    scene.until(scene.is_idle)
    assert scene.steps() == [10, 20, 30]  # a worker may find it damaged
    scene.decide(replace(scene.run.state, restore=None))
    scene.until(lambda: scene.run.state.restore is None)
    scene.checkpoints.search()
    scene.until(scene.is_idle)
    assert scene.steps() == [20, 30] and not scene.has_manifest(10)


def test_a_successor_deletes_what_its_predecessor_had_to_after_its_last_checkpoint(tmp_path: Path) -> None:
    """It was killed before it journalled that. The disk has no room for another checkpoint until then."""
    with small_disk(tmp_path / "disk", 24) as disk:
        past = Scene(disk)
        past.complete(10, 20, megabytes=3)
        run_inline(past.run.note(commit_checkpoint("run", past.run_dir, past.shard(30, megabytes=3))))
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - MB))
        with pytest.raises(OSError, match="No space left"):
            past.shard(40, megabytes=2)
        scene = Scene(disk)
        scene.until(scene.is_idle)
        assert scene.steps() == [20, 30] and not scene.has_manifest(10)
        scene.complete(40, megabytes=2)
        assert scene.steps() == [30, 40]


def test_old_checkpoints_that_could_not_be_looked_for_are_deleted_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*args: object) -> tuple[int, ...]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    scene = Scene(tmp_path)
    scene.complete(10, 20)
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.controller.run_checkpoints.superfluous", unreadable)
        scene.complete(30)
    assert scene.steps() == [10, 20, 30]
    scene.make_room()
    assert scene.steps() == [20, 30] and not scene.has_manifest(10)


def test_a_successor_deletes_what_its_predecessor_was_killed_before_deleting(tmp_path: Path) -> None:
    """Its next checkpoint fits on the disk then."""
    with small_disk(tmp_path / "disk", 24) as disk:
        past = Scene(disk)
        past.complete(10, 20, megabytes=3)
        run_inline(past.run.note(CheckpointsDeleted((10,)), stored=True))
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - MB))
        scene = Scene(disk)
        scene.until(scene.is_idle)
        assert not scene.has_manifest(10)
        scene.complete(30, megabytes=2)
        assert scene.steps() == [20, 30]


def test_on_a_full_disk_a_checkpoint_that_was_never_journalled_goes(tmp_path: Path) -> None:
    """Its manifest was written before the run went back."""
    scene = Scene(tmp_path)
    scene.complete(10)
    lost = scene.shard(20)
    commit_checkpoint("run", scene.run_dir, lost)
    scene.go_back(10)
    scene.until(lambda: scene.run.checkpoints.first_generation == 1)
    scene.commit(lost)
    scene.until(scene.is_idle)
    assert scene.has_manifest(20) and scene.steps() == [10]
    scene.make_room()
    assert not (scene.run_dir / DIRECTORY / checkpoint_name(20, 1, 0)).exists() and scene.has_manifest(10)


def test_a_checkpoint_that_was_abandoned_is_never_completed(tmp_path: Path) -> None:
    """Neither by this controller nor by its successor, which may see all of its parts."""
    scene = Scene(tmp_path)
    scene.complete(10)
    lost = scene.shard(20)
    scene.leave_generation()
    scene.make_room()
    assert scene.run.checkpoints.abandoned == (checkpoint_name(20, 1, 0),)
    successor = Scene(tmp_path)
    for each in (scene, successor):
        if each is successor:
            each.shard(20)
        each.commit(lost)
        each.until(each.is_idle)
        assert each.steps() == [10] and each.checkpoints.trouble is None


def test_a_checkpoint_with_a_damaged_part_is_tried_again_then_abandoned_and_later_ones_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.controller.run_checkpoints.COMMIT_AGAIN_S", 0.0)
    scene = Scene(tmp_path)
    scene.complete(10)
    action = scene.shard(20)
    (part,) = (scene.run_dir / DIRECTORY / checkpoint_name(20, 1, 0)).glob("shard-*")
    content = part.read_bytes()
    part.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    scene.commit(action)
    scene.until(scene.is_idle)
    assert scene.steps() == [10] and not scene.checkpoints.abandoned
    assert "the checkpoint of step 20 can't be completed" in str(scene.checkpoints.trouble)
    part.write_bytes(content)  # it was read wrongly
    scene.commit(action)
    scene.until(scene.is_idle)
    assert scene.steps() == [10, 20] and scene.checkpoints.trouble is None
    lost = scene.shard(30)
    next((scene.run_dir / DIRECTORY / checkpoint_name(30, 1, 0)).glob("shard-*")).unlink()
    for _ in range(MOST_COMMITS):
        assert not scene.checkpoints.abandoned
        scene.commit(lost)
        scene.until(scene.is_idle)
    assert scene.checkpoints.abandoned == {(0, 30)} and scene.steps() == [10, 20]
    scene.complete(40)
    assert scene.steps() == [20, 40] and scene.checkpoints.trouble is None


def test_where_the_file_system_is_not_mounted_nothing_counts_as_deleted_and_nothing_is_written(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10, 20)
    lost, away = scene.shard(30), tmp_path / "away"
    scene.run_dir.rename(away)
    scene.make_room()
    scene.commit(lost)
    scene.until(scene.is_idle)
    assert "its file system is not mounted" in str(scene.checkpoints.trouble) and not scene.checkpoints.abandoned
    scene.decide(replace(scene.run.state, wants_restore=True))
    scene.until(lambda: scene.run.state.wants_restore)
    scene.checkpoints.search()
    scene.until(lambda: bool(scene.checkpoints.unreadable))
    assert "its file system is not mounted" in scene.checkpoints.unreadable and scene.checkpoints.is_searching
    with pytest.raises(OSError, match="its file system is not mounted"):
        scene.shard(40)
    assert not scene.run_dir.exists()
    away.rename(scene.run_dir)
    scene.until(lambda: scene.is_idle() and scene.run.is_stored)
    assert scene.steps() == [10, 20] and scene.has_manifest(10)
    assert RunHistory(scene.run_dir, LIMITS).checkpoints == scene.run.checkpoints


def test_parts_are_not_deleted_before_storage_has_it_that_they_are_abandoned(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10)
    scene.shard(20)
    scene.leave_generation()
    directory = scene.run_dir / DIRECTORY / checkpoint_name(20, 1, 0)
    with scene.storage.hanging():
        scene.checkpoints.make_room(scene.observe)
        scene.until(lambda: not scene.run.is_stored)
        scene.go_on_once_kept()
        assert directory.is_dir()
    scene.until(lambda: not directory.exists())


def test_a_past_controller_deletes_nothing(tmp_path: Path) -> None:
    """What it takes for abandoned, its successor may have completed."""
    past = Scene(tmp_path)
    past.complete(10)
    lost = past.shard(20)
    past.leave_generation()
    successor = Scene(tmp_path)
    successor.commit(lost)
    successor.until(successor.is_idle)
    before = set((past.run_dir / DIRECTORY).rglob("*"))
    with pytest.raises(TermSuperseded):
        past.make_room()
    past.thread.abandon()
    assert set((past.run_dir / DIRECTORY).rglob("*")) == before
    assert successor.has_manifest(20) and successor.steps() == [10, 20]


def test_what_was_set_aside_stays_until_storage_has_that_on_record(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        scene = Scene(disk)
        scene.complete(10, 20, megabytes=3)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - MB))
        with scene.storage.hanging():
            scene.go_back(10)
            scene.until(lambda: scene.steps() == [10])  # by the entry that the cluster keeps
            scene.make_room()
            assert scene.has_manifest(20)
        scene.until(lambda: scene.run.is_stored)
        scene.checkpoints._made_room_s = float("-inf")
        scene.make_room()
        assert not scene.has_manifest(20) and scene.has_manifest(10)


def test_checkpoints_are_read_whole_once_a_worker_has_found_damage(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.complete(10, 20)
    shard = next((scene.run_dir / DIRECTORY / checkpoint_name(20, 1, 0)).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    plan = GenerationPlan(1, World(0, ("w0",)), ExpertPlacement.balanced(1, 1), None, "1/0", StoreAddress("", 1))
    found = []
    for current in (plan, None):  # no generation is left after the first one that was to begin from it
        scene.decide(replace(scene.run.state, wants_restore=True, current=current))
        scene.until(lambda: scene.run.state.wants_restore)
        scene.checkpoints.search()
        scene.until(lambda: not scene.checkpoints.is_searching)
        found.append(scene.checkpoints.restorable)
        scene.decide(replace(scene.run.state, wants_restore=False))
        scene.until(lambda: not scene.run.state.wants_restore)
        scene.checkpoints.search()
    assert [restore and restore.step for restore in found] == [20, 10]
