"""How a run's checkpoints become complete, which are deleted, and what a kill at any moment leaves."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import MANIFEST_FILE, checkpoint_name
from orchestrator.checkpoint.retention import discard
from orchestrator.checkpoint.shard_file import ShardPiece
from orchestrator.errors import CheckpointCorrupt, NotFound, TermSuperseded
from orchestrator.policy.lifecycle import first_state
from orchestrator.policy.state.config import RunLimits
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.training import CheckpointsAbandoned, CheckpointsDeleted
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords
from orchestrator.run_records.checkpoints.completion import (
    commit_checkpoint,
    discard_garbage,
    drop_set_aside,
    hopeless,
    superfluous,
)
from orchestrator.run_records.checkpoints.search import (
    DIRECTORY,
    choose,
    list_checkpoints,
    newest_good,
    path_of,
)
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import RunHistory
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import run_inline
from tests.support.checkpoints import write_shard
from tests.support.disk import small_disk

MB = 2**20
LIMITS = RunLimits.of("r", JobSpec(name="r"))


def _shard(run_dir: Path, step: int, generation: int = 0, megabytes: float = 0.01) -> Commit:
    """What is to be completed of a checkpoint, whose one rank has written its part."""
    size = int(megabytes * MB) // 4
    piece = ShardPiece("w", 0, size, np.full(size, step, np.float32))
    shard = write_shard(run_dir / DIRECTORY, [piece], step=step, term=1, generation=generation, rank=0)
    return Commit(step, 1, generation, (shard,))


def _complete(run: JournaledRun, run_dir: Path, action: Commit, keep_last: int | None = None) -> None:
    """As the controller does it."""
    run_inline(run.note(commit_checkpoint("r", run_dir, action)))
    dropped = superfluous(run_dir, run.checkpoints, CheckpointSpec(keep_last=keep_last), ())
    if dropped:
        run_inline(run.note(CheckpointsDeleted(dropped)))
    discard_garbage(run_dir, run.checkpoints)


def _go_back(run: JournaledRun, step: int, num_generations: int) -> None:
    state = replace(first_state(LIMITS), checkpoint_done=step, checkpoint_generation=num_generations - 1)
    run_inline(run.decided(state, [RolledBack(step, None, "a loss")]))


def _records(run_dir: Path) -> CheckpointRecords:
    """By the journal as it is in storage."""
    return RunHistory(run_dir, LIMITS).checkpoints


def _steps(run_dir: Path) -> list[int]:
    return [record.step for record in list_checkpoints(run_dir, _records(run_dir))]


def _on_disk(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / DIRECTORY).iterdir())


def _damage(run_dir: Path, step: int) -> None:
    record = _records(run_dir).of(step)
    assert record is not None
    with next(path_of(run_dir, record).glob("shard-*")).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")


# -- Completion --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_complete_once_the_journal_names_it(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    event = commit_checkpoint("r", tmp_path, _shard(tmp_path, 9))
    assert (Path(event.path) / MANIFEST_FILE).exists() and _steps(tmp_path) == []
    assert newest_good(tmp_path, _records(tmp_path)) is None
    run_inline(run.note(event))
    assert _steps(tmp_path) == [9] and run.checkpoints == _records(tmp_path)
    restore = newest_good(tmp_path, run.checkpoints)
    assert restore is not None and (restore.step, restore.path) == (9, event.path)


def test_a_superseded_controller_completes_and_deletes_nothing(tmp_path: Path) -> None:
    past = JournaledRun(tmp_path, LIMITS)
    _complete(past, tmp_path, _shard(tmp_path, 9))
    _complete(past, tmp_path, _shard(tmp_path, 19))
    successor = JournaledRun(tmp_path, LIMITS)
    with pytest.raises(TermSuperseded):
        _complete(past, tmp_path, _shard(tmp_path, 29), keep_last=1)
    with pytest.raises(TermSuperseded):
        run_inline(past.note(CheckpointsDeleted((9,))))
    assert _steps(tmp_path) == [9, 19] and newest_good(tmp_path, _records(tmp_path)) is not None
    _complete(successor, tmp_path, _shard(tmp_path, 39, generation=1))
    assert _steps(tmp_path) == [9, 19, 39]
    assert checkpoint_name(29, 1, 0) not in _on_disk(tmp_path)  # what it wrote is garbage


def test_a_successor_completes_what_its_predecessor_has_not_journalled(tmp_path: Path) -> None:
    past = JournaledRun(tmp_path, LIMITS)
    action = _shard(tmp_path, 9)
    event = commit_checkpoint("r", tmp_path, action)
    successor = JournaledRun(tmp_path, LIMITS)
    assert commit_checkpoint("r", tmp_path, action) == event
    run_inline(successor.note(event))
    assert _steps(tmp_path) == [9] and past.term < successor.term


# -- A kill at any moment ----------------------------------------------------------------------------------------------

CALLS = ("os.mkdir", "os.link", "os.remove", "os.rmdir", "os.rename", "os.scandir", "os.listdir")


def _killed_at(number: int, run_dir: Path, work: Callable[[], None]) -> bool:
    """Do it in a child process that is killed just before its call of this number to storage. Returns whether it was;
    else it made fewer."""
    pid = os.fork()
    if pid == 0:
        left = [number]

        def count(event: str, args: tuple[object, ...]) -> None:
            if event in CALLS or (event == "open" and str(args[0]).startswith(str(run_dir))):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_controller_that_is_killed_at_any_call_loses_no_promised_checkpoint(tmp_path: Path) -> None:
    """Its successor completes the same one, and what it has deleted, or was to delete, is gone after that."""
    number, was_killed = 0, True
    while was_killed:
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        run = JournaledRun(run_dir, LIMITS)
        for step in (9, 19, 29):
            _complete(run, run_dir, _shard(run_dir, step), keep_last=2)
        action = _shard(run_dir, 39)
        del run
        was_killed = _killed_at(
            number, run_dir, lambda at=run_dir, to=action: _complete(JournaledRun(at, LIMITS), at, to, 2)
        )
        steps = _steps(run_dir)
        assert steps in ([19, 29], [19, 29, 39], [29, 39]), f"killed at call {number}"
        for step in steps[-2:]:
            assert choose(run_dir, _records(run_dir), step) is not None, f"killed at call {number}"
        _complete(JournaledRun(run_dir, LIMITS), run_dir, action, keep_last=2)
        assert _steps(run_dir) == [29, 39]
        assert _on_disk(run_dir) == [checkpoint_name(29, 1, 0), checkpoint_name(39, 1, 0)]
        assert not list((run_dir / DIRECTORY).rglob("*.partial"))
        shutil.rmtree(run_dir)
        number += 1
    assert number > 20  # the calls that were tried


def test_a_rank_that_is_killed_at_any_call_leaves_nothing_that_a_checkpoint_has(tmp_path: Path) -> None:
    number, was_killed = 0, True
    while was_killed:
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        run = JournaledRun(run_dir, LIMITS)
        was_killed = _killed_at(number, run_dir, lambda at=run_dir: _shard(at, 9) and None)
        assert _steps(run_dir) == []
        _complete(run, run_dir, _shard(run_dir, 9))
        (path,) = (run_dir / DIRECTORY).iterdir()
        assert len(list(path.iterdir())) == 2 and choose(run_dir, run.checkpoints) == path
        number += 1
    assert number > 3


# -- Retention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_only_a_newer_checkpoint_makes_an_old_one_go(tmp_path: Path, keep_last: int) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    for step in range(1, 6):
        _complete(run, tmp_path, _shard(tmp_path, step), keep_last)
        assert _steps(tmp_path) == list(range(max(1, step - keep_last + 1), step + 1))
        assert len(_on_disk(tmp_path)) == len(_steps(tmp_path))


def test_one_that_was_removed_by_hand_does_not_count(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    for step in (10, 20, 30):
        _complete(run, tmp_path, _shard(tmp_path, step))
    record = run.checkpoints.of(20)
    assert record is not None
    discard(path_of(tmp_path, record))
    _complete(run, tmp_path, _shard(tmp_path, 40), keep_last=3)
    assert _steps(tmp_path) == [10, 30, 40]
    assert [record.step for record in run.checkpoints.current] == [10, 30, 40]


def test_remains_of_an_interrupted_deletion_are_deleted(tmp_path: Path) -> None:
    """While it does, its manifest may only be out of sight."""
    run = JournaledRun(tmp_path, LIMITS)
    for step in (10, 20):
        _complete(run, tmp_path, _shard(tmp_path, step))
    (path_of(tmp_path, run.checkpoints.current[0]) / MANIFEST_FILE).unlink()
    discard_garbage(tmp_path, run.checkpoints)
    assert _on_disk(tmp_path) == [checkpoint_name(10, 1, 0), checkpoint_name(20, 1, 0)]
    dropped = superfluous(tmp_path, run.checkpoints, CheckpointSpec(keep_last=None), ())
    assert dropped == (10,)
    run_inline(run.note(CheckpointsDeleted(dropped)))
    discard_garbage(tmp_path, run.checkpoints)
    assert _on_disk(tmp_path) == [checkpoint_name(20, 1, 0)]


def test_one_that_can_not_be_deleted_keeps_no_other(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    _complete(run, tmp_path, _shard(tmp_path, 50))
    for step in (10, 20, 30):
        _shard(tmp_path, step)
    stuck = tmp_path / DIRECTORY / checkpoint_name(20, 1, 0) / MANIFEST_FILE
    stuck.mkdir()  # which can't be unlinked
    discard_garbage(tmp_path, run.checkpoints)
    assert _on_disk(tmp_path) == [checkpoint_name(20, 1, 0), checkpoint_name(50, 1, 0)]


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    for step in (1, 2, 3, 4):
        _complete(run, tmp_path, _shard(tmp_path, step))
    keep = CheckpointSpec(keep_last=1, keep_best=1)
    assert superfluous(tmp_path, run.checkpoints, keep, ((1, 3.0), (2, 1.0), (3, 2.0))) == (1, 3)
    assert superfluous(tmp_path, run.checkpoints, CheckpointSpec(keep_last=None), ()) == ()


def test_garbage_is_what_no_journal_names_and_no_rank_completes(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    _shard(tmp_path, 25, generation=2)  # later shards of the same writers are complete: given up
    _shard(tmp_path, 50, generation=1)  # of the past
    coming = [_shard(tmp_path, 20, generation=3), _shard(tmp_path, 40, generation=2)]
    for step in (10, 20, 30):
        _complete(run, tmp_path, _shard(tmp_path, step, generation=2), keep_last=2)
    names = {checkpoint_name(step, 1, 2) for step in (20, 30)}
    assert set(_on_disk(tmp_path)) == names | {checkpoint_name(20, 1, 3), checkpoint_name(40, 1, 2)}
    for action in reversed(coming):
        _complete(run, tmp_path, action)
    assert _steps(tmp_path) == [20] and run.checkpoints.newest == (3, 20)


def test_parts_that_can_not_be_completed_are_deleted_after_their_journal_entry(tmp_path: Path) -> None:
    """With or without a manifest."""
    run = JournaledRun(tmp_path, LIMITS)
    _shard(tmp_path, 1)  # older than the newest checkpoint: garbage anyway
    _complete(run, tmp_path, _shard(tmp_path, 5))
    _shard(tmp_path, 2)
    names = [checkpoint_name(step, 1, g) for step, g in ((9, 0), (19, 1), (29, 0))]
    for name in (*names, "another"):
        (tmp_path / DIRECTORY / name).mkdir(parents=True)
    (tmp_path / DIRECTORY / names[2] / MANIFEST_FILE).write_text("{}")  # given up before it was journalled
    kept = {names[1], "another", checkpoint_name(5, 1, 0)}

    def can_complete(step: int, term: int, generation: int) -> bool:
        return generation == 1

    found = hopeless(tmp_path, run.checkpoints, can_complete)
    assert found == (names[0], names[2])
    discard_garbage(tmp_path, run.checkpoints)
    assert set(_on_disk(tmp_path)) == {*names, *kept}
    run_inline(run.note(CheckpointsAbandoned(found)))
    discard_garbage(tmp_path, _records(tmp_path))
    assert set(_on_disk(tmp_path)) == kept
    assert hopeless(tmp_path, run.checkpoints, can_complete) == ()


def test_a_superseded_controller_abandons_nothing(tmp_path: Path) -> None:
    past = JournaledRun(tmp_path, LIMITS)
    action = _shard(tmp_path, 9)
    successor = JournaledRun(tmp_path, LIMITS)
    with pytest.raises(TermSuperseded):
        run_inline(past.note(CheckpointsAbandoned((checkpoint_name(9, 1, 0),))))
    discard_garbage(tmp_path, past.checkpoints)
    _complete(successor, tmp_path, action)
    assert _steps(tmp_path) == [9] and newest_good(tmp_path, _records(tmp_path)) is not None


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run on a disk of 24 MB that has gone back from step 40 to 10: four checkpoints of 3 MB."""
    with small_disk(tmp_path / "disk", 24) as disk:
        run = JournaledRun(disk, LIMITS)
        for step in (10, 20, 30, 40):
            _complete(run, disk, _shard(disk, step, megabytes=3))
        _go_back(run, 10, 1)
        yield disk


def _set_aside(run_dir: Path) -> list[int]:
    """Steps of those that are there."""
    return [record.step for record in _records(run_dir).set_aside if path_of(run_dir, record).exists()]


def _fill_up_to(disk: Path, megabytes: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - megabytes * MB))


def test_a_disk_with_room_keeps_checkpoints_that_were_set_aside(run_dir: Path) -> None:
    drop_set_aside(run_dir, _records(run_dir))
    assert _set_aside(run_dir) == [20, 30, 40] and _steps(run_dir) == [10]


def test_on_a_full_disk_they_go_until_the_next_one_fits(run_dir: Path) -> None:
    _fill_up_to(run_dir, 2)
    with pytest.raises(OSError, match="No space left"):
        _shard(run_dir, 20, generation=1, megabytes=3)
    drop_set_aside(run_dir, _records(run_dir))
    assert _set_aside(run_dir) == [40] and newest_good(run_dir, _records(run_dir)) is not None
    _complete(JournaledRun(run_dir, LIMITS), run_dir, _shard(run_dir, 20, generation=1, megabytes=3))
    assert _steps(run_dir) == [10, 20] and _set_aside(run_dir) == [40]


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_without_a_good_checkpoint_nothing_set_aside_is_deleted(run_dir: Path, harm: str) -> None:
    """They may hold the run's last good state."""
    _fill_up_to(run_dir, 0)
    if harm == "gone":
        (only,) = _records(run_dir).current
        discard(path_of(run_dir, only))
        _fill_up_to(run_dir, 0)
    else:
        _damage(run_dir, 10)
    with suppress(OSError):
        drop_set_aside(run_dir, _records(run_dir))
    assert _set_aside(run_dir) == [20, 30, 40]


def test_the_last_two_good_checkpoints_are_kept_after_the_newest_ones_were_damaged(tmp_path: Path) -> None:
    """The run goes back to step 20, past two damaged ones, and writes another one."""
    run = JournaledRun(tmp_path, LIMITS)
    for step in (10, 20, 30, 40):
        _complete(run, tmp_path, _shard(tmp_path, step))
    for step in (30, 40):
        _damage(tmp_path, step)
    restore = newest_good(tmp_path, run.checkpoints)
    assert restore is not None and restore.step == 20
    _go_back(run, restore.step, 1)
    _complete(run, tmp_path, _shard(tmp_path, 35, generation=1), keep_last=2)
    assert _steps(tmp_path) == [20, 35]
    found = newest_good(tmp_path, run.checkpoints)
    assert found is not None and found.step == 35


# -- Choice ------------------------------------------------------------------------------------------------------------


def test_the_newest_is_chosen_unless_a_step_is_named(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    assert choose(tmp_path, run.checkpoints) is None
    for step in (1, 2):
        _complete(run, tmp_path, _shard(tmp_path, step))
    first, second = (path_of(tmp_path, record) for record in run.checkpoints.current)
    assert choose(tmp_path, run.checkpoints) == second and choose(tmp_path, run.checkpoints, 1) == first
    with pytest.raises(NotFound, match="no checkpoint of step 5; it holds 1, 2"):
        choose(tmp_path, run.checkpoints, 5)


def test_a_damaged_checkpoint_is_not_chosen_and_the_good_one_before_is_offered(tmp_path: Path) -> None:
    run = JournaledRun(tmp_path, LIMITS)
    for step in (1, 2, 3):
        _complete(run, tmp_path, _shard(tmp_path, step))
    for step in (2, 3):
        _damage(tmp_path, step)
    with pytest.raises(CheckpointCorrupt) as caught:
        choose(tmp_path, run.checkpoints)
    assert caught.value.remedy.endswith(f"before it is {path_of(tmp_path, run.checkpoints.current[0])}")
    _damage(tmp_path, 1)
    with pytest.raises(CheckpointCorrupt, match="There is no good checkpoint before it"):
        choose(tmp_path, run.checkpoints)


def test_one_whose_manifest_is_not_the_journals_is_damaged(tmp_path: Path) -> None:
    """A whole checkpoint in another's place."""
    run = JournaledRun(tmp_path, LIMITS)
    _complete(run, tmp_path, _shard(tmp_path, 1))
    (record,) = run.checkpoints.current
    shutil.rmtree(path_of(tmp_path, record))
    commit_checkpoint("r", tmp_path, _shard(tmp_path, 1, megabytes=0.02))
    with pytest.raises(CheckpointCorrupt, match="the run's journal names it with"):
        choose(tmp_path, run.checkpoints)
    with pytest.raises(OSError, match="none is good.*the run's journal names it with"):
        newest_good(tmp_path, run.checkpoints)
