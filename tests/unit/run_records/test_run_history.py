import errno
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.policy.state.progress import Progress
from orchestrator.policy.state.requests import resumed
from orchestrator.policy.state.run_parts import ReplayState
from orchestrator.policy.state.run_state import Observation, RunState, ended
from orchestrator.protocol.changes import changed
from orchestrator.protocol.events.base import Event, JournalEntry, plain_of_entry
from orchestrator.protocol.events.generations import Activated, Rescaled
from orchestrator.protocol.events.notices import StorageFails, StorageWorks
from orchestrator.protocol.events.run import Ended, Submitted, TargetChanged
from orchestrator.protocol.events.training import StageBegan
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.protocol.status import Rescale, RunPhase, RunStatus, WorkerStatus
from orchestrator.protocol.worker_phase import Phase
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.run_records.run_history import read_steps, user_events
from orchestrator.run_records.status import status_of
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.condition import StorageCondition
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import read_events
from orchestrator.storage.tasks import run_inline
from orchestrator.telemetry.step_metrics import points_of_event, points_of_steps
from tests.unit.policy.imagined import Life, limits_of, record

LIMITS = limits_of(steps=30)
MODEL = ModelSpec()
ACTIVATED = Activated(0, 0, 2, -1, "the run starts", members=("w0", "w1"))


def remembered(run_dir: Path) -> JournaledRun:
    return JournaledRun(run_dir, LIMITS)


def test_a_successor_remembers_everything(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    run_inline(memory.note(Submitted("run", 2)))
    run_inline(memory.prepared(PreparedData("/store", 300, "/tokenizer.json")))
    life = Life(LIMITS)
    life.run_until(lambda: life.step == 6)
    run_inline(memory.decided(life.state, [ACTIVATED]))
    run_inline(memory.absorb(life.progress.recent, up_to=10_000))
    run_inline(memory.absorb([record(6), record(7, generation=0)], up_to=10_000))
    successor = remembered(tmp_path)
    assert successor.state == life.state
    assert successor.progress == memory.progress and successor.progress.watermark == 7
    assert successor.data == memory.data
    assert successor.times == memory.times and set(memory.times) >= {Submitted, Activated}


def test_users_see_what_happened_but_no_bookkeeping(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    entries = run_inline(memory.decided(replace(memory.state, seq=3), [TargetChanged(2, "no", "asked for")]))
    run_inline(memory.absorb([record(0)], up_to=10_000))
    assert [entry.event.kind for entry in entries] == ["target"]
    assert user_events(tmp_path) == [plain_of_entry(entry) for entry in entries]
    assert [step.step for step in read_steps(tmp_path)] == [0]


def test_an_unchanged_state_is_not_written_again(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    run_inline(memory.decided(memory.state, []))
    assert run_inline(memory.absorb([], up_to=10_000)) == ([], [])
    assert read_events(objects_at(tmp_path)) == []


def test_records_that_are_known_are_written_once(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    run_inline(memory.absorb([record(0), record(1)], up_to=10_000))
    assert [step.step for step in run_inline(memory.absorb([record(1), record(2)], up_to=10_000))[0]] == [2]
    assert [step.step for step in read_steps(tmp_path)] == [0, 1, 2]


def test_a_stage_that_begins_is_an_event_once(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    stages = ["easy", "easy", "all", "all"]
    records = [changed(record(step), stage=stage, sequence_length=8) for step, stage in enumerate(stages)]
    _, begun = run_inline(memory.absorb(records[:1], up_to=10_000))
    assert [entry.event for entry in begun] == [StageBegan("easy", 0, 8)]
    assert run_inline(memory.absorb(records[1:2], up_to=10_000))[1] == []
    memory = remembered(tmp_path)  # a successor knows the stage
    assert [e.event for e in run_inline(memory.absorb(records, up_to=10_000))[1]] == [StageBegan("all", 2, 8)]
    assert [e["stage"] for e in user_events(tmp_path) if e["kind"] == "stage_began"] == ["easy", "all"]
    assert memory.progress.stage == "all"


def test_what_cannot_be_written_changes_nothing_and_is_tried_again(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    (tmp_path / "journal").rename(tmp_path / "away")
    (tmp_path / "journal").touch()  # no directory: even root can't write into it
    with pytest.raises(StorageError, match="can't be written"):
        run_inline(memory.absorb([record(0)], up_to=10_000))
    assert memory.progress.watermark == -1 and "can't be written" in str(memory.trouble)
    (tmp_path / "journal").unlink()
    (tmp_path / "away").rename(tmp_path / "journal")
    run_inline(memory.absorb([record(0)], up_to=10_000))
    assert memory.trouble is None and [step.step for step in read_steps(tmp_path)] == [0]


def status_after(tmp_path: Path, state: RunState, closed: bool) -> RunStatus:
    memory = remembered(tmp_path)
    run_inline(memory.absorb([record(0), record(1)], up_to=10_000))
    run_inline(memory.decided(state, []))
    seen = Observation(term=1, now_s=0.0, target=state.target, progress=memory.progress)
    return status_of(LIMITS, MODEL, memory, seen, run_dir=tmp_path, closed=closed)


def test_a_run_has_ended_only_when_everything_is_closed(tmp_path: Path) -> None:
    over = ended(RunState(target=Life(LIMITS).target), RunPhase.FAILED, "w1 died").state
    assert status_after(tmp_path, over, closed=False).phase is RunPhase.FINISHING
    (tmp_path / "closed").mkdir()
    status = status_after(tmp_path / "closed", over, closed=True)
    assert (status.phase, status.error, status.step) == (RunPhase.FAILED, "w1 died", 2)


def test_the_status_warns_of_steps_that_did_not_reproduce(tmp_path: Path) -> None:
    state = RunState(target=Life(LIMITS).target, replay=ReplayState(differences=(9, 7)))
    warning = status_after(tmp_path, state, closed=False).warning
    assert warning is not None and warning.startswith("step 7 did not reproduce") and "resume it with --step" in warning
    memory = remembered(tmp_path)
    seen = Observation(term=1, now_s=0.0, target=state.target, progress=memory.progress)
    both = status_of(
        LIMITS, MODEL, memory, seen, run_dir=tmp_path, closed=False, warning="metrics wait on disk"
    ).warning
    assert both == f"metrics wait on disk; {warning}"


def test_the_status_names_members_by_rank_then_the_others_but_no_lost_worker(tmp_path: Path) -> None:
    life = Life(LIMITS)
    life.run_until(lambda: life.step == 3)
    memory = remembered(tmp_path)
    first, second, *others = life.state.members + tuple(
        w for w in life.state.worker_group if w not in life.state.members
    )
    run_inline(memory.decided(replace(life.state, worker_group=(*life.state.worker_group, "w9")), []))
    seen = life.seen(nodes={first: "here"}, lost={second: "it died"})
    worker_group = status_of(LIMITS, MODEL, memory, seen, run_dir=tmp_path, closed=False).worker_group
    assert worker_group[0] == WorkerStatus(first, 0, Phase.TRAINING, "here")
    assert [worker.worker for worker in worker_group[1:]] == [*others, "w9"]
    assert worker_group[-1] == WorkerStatus("w9", None, Phase.COLD)


def test_points_of_steps_count_on() -> None:
    before = Progress(watermark=4, tokens=500, skipped=1)
    skipped = record(6, applied=False, grad_norm=float("inf"), validation_loss=2.5, communication_wait_s=0.25)
    points = {(p.name, p.step): p.value for p in points_of_steps(before, [record(5), skipped])}
    assert points["train/tokens", 5] == 600 and points["train/tokens", 6] == 700
    assert points["train/skipped", 5] == 1 and points["train/skipped", 6] == 2
    assert ("train/grad_norm", 5) in points and ("train/grad_norm", 6) not in points
    assert points["eval/loss", 6] == 2.5 and ("eval/loss", 5) not in points
    name = "perf/communication_wait_s"
    assert points[name, 6] == 0.25 and (name, 5) not in points  # an older journal doesn't tell


def test_points_of_a_rescale_stand_at_the_first_new_step() -> None:
    rescale = Rescale(1, 2, 3, step=59, why="", moved_bytes=7, stall_s=0.5)
    event = JournalEntry(3, 1, 0.0, Rescaled(**vars(rescale)))
    assert {(p.name, p.value, p.step) for p in points_of_event(event)} == {
        ("elastic/rescale_stall_s", 0.5, 60),
        ("elastic/moved_bytes", 7.0, 60),
    }


def test_a_run_resumed_from_a_checkpoint_forgets_the_steps_after_it(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    run_inline(memory.absorb([record(step) for step in range(6)], up_to=10_000))
    run_inline(memory.decided(*_over(memory.state, "failed")))
    order = ResumeRequest("token", Restore(3, "/x"))
    decision = resumed(LIMITS, memory.state, order)
    run_inline(memory.decided(decision.state, [action for action in decision.actions if isinstance(action, Event)]))
    assert memory.progress.watermark == 3 and memory.progress.tokens == sum(record(s).batch.tokens for s in range(4))
    assert Ended not in memory.times and memory.resumed_by == "token"
    run_inline(memory.absorb([record(4, generation=1)], up_to=10_000))
    successor = remembered(tmp_path)
    for one in (memory, successor):
        assert one.state.outcome is None and one.state.restore == Restore(3, "/x")
        assert one.progress.watermark == 4
    assert [(r.step, r.generation) for r in read_steps(tmp_path)] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1)]


def _over(state: RunState, why: str) -> tuple[RunState, list[Event]]:
    decision = ended(state, RunPhase.FAILED, why)
    return decision.state, [action for action in decision.actions if isinstance(action, Event)]


def test_a_full_disk_is_journalled_in_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = remembered(tmp_path)
    assert (tmp_path / ".reserve").exists()
    create, refused = DirectoryObjects.create, []

    def create_if_reserve_is_gone(objects: DirectoryObjects, key: str, data: bytes) -> bytes:
        if (tmp_path / ".reserve").exists():
            refused.append(key)
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(objects, key, data)

    monkeypatch.setattr(DirectoryObjects, "create", create_if_reserve_is_gone)
    run_inline(memory.absorb([record(0)], up_to=10_000))
    assert len(refused) == 1 and memory.trouble is None
    assert [step.step for step in read_steps(tmp_path)] == [0]


def test_a_term_is_taken_in_the_reserve_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered(tmp_path)
    create = DirectoryObjects.create

    def create_if_reserve_is_gone(objects: DirectoryObjects, key: str, data: bytes) -> bytes:
        if (tmp_path / ".reserve").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(objects, key, data)

    monkeypatch.setattr(DirectoryObjects, "create", create_if_reserve_is_gone)
    assert remembered(tmp_path).term == 2


def test_a_successor_knows_that_storage_refused_something(tmp_path: Path) -> None:
    memory = remembered(tmp_path)
    run_inline(memory.note(StorageFails(StorageCondition.FULL, "full")))
    assert remembered(tmp_path).storage is StorageCondition.FULL
    memory = remembered(tmp_path)
    run_inline(memory.note(StorageWorks()))
    assert remembered(tmp_path).storage is StorageCondition.WELL
