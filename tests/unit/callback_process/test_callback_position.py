"""Steps for callbacks from a run's journal, and their position in it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.callbacks.early_stopping import EarlyStopping
from orchestrator.callback import SaveCheckpoint, Step, Stop
from orchestrator.callback_process.callback_position import (
    FOLDER,
    Position,
    read_position,
    read_steps_after,
    store_position,
    thinned,
)
from orchestrator.protocol.events.base import Event, JournalEntry, plain_of_entry
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.spec.job import JobSpec
from tests.support.recorded_run import write_journal


def _record(step: int) -> StepRecord:
    return StepRecord(
        step, 4, 1, 1.5, BatchRecord(10, step, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.1, 0.0)
    )


def test_steps_come_once_and_again_only_after_the_run_went_back(tmp_path: Path) -> None:
    def steps(first: int, last: int) -> StepsCommitted:
        return StepsCommitted(tuple(_record(step) for step in range(first, last + 1)))

    events = [steps(0, 2), steps(0, 2), steps(3, 4), Resumed("t", 2, None, 1), steps(3, 5)]
    write_journal(tmp_path, [plain_of_entry(JournalEntry(seq, 1, 0.0, event)) for seq, event in enumerate(events)])

    def after(position: Position) -> list[list[int]]:
        return [[step.step for step in read.steps] for read in read_steps_after(str(tmp_path), position)]

    found = read_steps_after(str(tmp_path), Position())
    assert after(Position()) == [[0, 1, 2], [], [], [3, 4, 5]]  # the first 3 and 4 count no longer
    assert [read.newest for read in found] == [2, 2, 2, 5]
    seqs = [read.seq for read in found]
    assert after(Position(seqs[1], 2)) == [[], [3, 4, 5]]
    assert after(Position(seqs[2], 4)) == [[3, 4, 5]]
    assert after(Position(seqs[-1], 5)) == []


def test_a_resume_from_an_earlier_step_goes_back_to_the_states_before_it(tmp_path: Path) -> None:
    events: list[Event] = [StepsCommitted((_record(step),)) for step in range(40)]
    events.append(Resumed("t", 21, None, 1))
    entries = [plain_of_entry(JournalEntry(seq, 1, 0.0, event)) for seq, event in enumerate(events)]
    write_journal(tmp_path, entries[:-1])
    for read in read_steps_after(str(tmp_path), Position()):
        store_position(str(tmp_path), Position(read.seq, read.newest, (("a:b", {"newest": read.newest}),)))
    assert read_position(str(tmp_path)).step == 39 and len(list((tmp_path / FOLDER).iterdir())) < 15
    shutil.rmtree(tmp_path / "journal")
    write_journal(tmp_path, entries)
    position = read_position(str(tmp_path))
    assert 10 <= position.step <= 21 and position.states == (("a:b", {"newest": position.step}),)
    again = [step.step for read in read_steps_after(str(tmp_path), position) for step in read.steps]
    assert again == list(range(position.step + 1, 22))


@given(st.integers(1, 400), st.integers(1, 9))
def test_of_old_positions_enough_are_kept(count: int, stride: int) -> None:
    kept: list[int] = []
    for number in range(0, count * stride, stride):
        kept = sorted(thinned([*kept, number]))
    newest = kept[-1]
    assert kept[0] == 0 and newest == (count - 1) * stride and len(kept) <= 2 * count.bit_length() + 2
    for wanted in range(newest):
        found = max(number for number in kept if number <= wanted)
        assert newest - found <= 2 * (newest - wanted) + stride


def test_the_newest_position_is_kept_with_the_states(tmp_path: Path) -> None:
    assert read_position(str(tmp_path)) == Position()
    first = Position(7, 3, (("a:b", {"best": float("inf"), "waited": 0}), ("c:d", {})))
    for position in (first, Position(12, 9, (("a:b", {"best": 2.5, "waited": 1}),))):
        store_position(str(tmp_path), position)
        assert read_position(str(tmp_path)) == position
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_early_stopping() -> None:
    callback, requests = EarlyStopping(patience=2, min_delta=0.1), []
    seen = Step(step=0, loss=1.0, lr=0.1, grad_norm=1.0, applied=True, tokens=8, world_size=2, step_s=0.1, time=0.0)
    for step, loss in enumerate([5.0, None, 4.0, 3.95, None, 4.2, 1.0]):
        resumed = EarlyStopping(patience=2, min_delta=0.1)  # in another process after each step
        resumed.load_state_dict(callback.state_dict())
        callback = resumed
        requests.append(callback.on_step(replace(seen, step=step, validation_loss=loss)))
    kinds = [type(request) for request in requests if request is not None]
    assert kinds == [SaveCheckpoint, SaveCheckpoint, Stop, SaveCheckpoint] and requests[1] is requests[3] is None
    assert requests[5].reason == "2 validations without one below 4.0000"


def test_one_function_makes_one_callback() -> None:
    twice = [{"entrypoint": "a:b"}, {"entrypoint": "c:d"}, {"entrypoint": "a:b"}]
    with pytest.raises(ValidationError, match="callbacks names a:b twice; give it another function"):
        JobSpec.model_validate({"schema": "v1", "name": "own", "callbacks": twice})
