"""Which checkpoints there are, by a journal's events."""

import json
from dataclasses import replace
from itertools import permutations

import pytest

from orchestrator.policy.state.run_state import RunState, StateDecided
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.events.base import Event
from orchestrator.protocol.events.generations import RolledBack
from orchestrator.protocol.events.run import Resumed, Suspended
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsAbandoned, CheckpointsDeleted
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.run_records.checkpoints.checkpoint_records import CheckpointRecords


def done(step: int, generation: int = 0) -> Event:
    return CheckpointCommitted(step, f"/runs/r/checkpoints/{step}-{generation}", generation, f"sha of {step}")


def back_to(step: int, num_generations: int, event: Event | None = None) -> tuple[Event, ...]:
    """The run goes back to the checkpoint of `step`, after so many generations."""
    state = RunState(DesiredRunState(0, 1), checkpoint_done=step, checkpoint_generation=num_generations - 1)
    return (event or RolledBack(step, None, "a loss"), StateDecided(state))


def after(*events: Event) -> CheckpointRecords:
    records = CheckpointRecords()
    for event in events:
        records = records.after(event)
    return records


def current(*events: Event) -> list[str]:
    return [record.name for record in after(*events).current]


def aside(*events: Event) -> list[str]:
    return [record.name for record in after(*events).set_aside]


def test_what_was_abandoned_never_becomes_a_checkpoint_and_what_is_one_is_not_abandoned() -> None:
    records = after(done(9), CheckpointsAbandoned(("9-0", "19-0")), done(19), done(29))
    assert [record.step for record in records.current] == [9, 29] and records.abandoned == ("19-0",)
    assert from_plain(CheckpointRecords, json.loads(json.dumps(to_plain(records)))) == records


def test_the_journals_events_make_and_unmake_checkpoints() -> None:
    records = after(done(9), done(19), done(29), CheckpointsDeleted((9,)))
    assert [record.step for record in records.current] == [19, 29] and records.set_aside == ()
    assert records.newest == (0, 29) and records.of(19) == records.current[0] and records.of(9) is None
    assert records.names == {"19-0", "29-0"}
    assert after().newest == (-1, -1)


def test_a_checkpoint_journalled_twice_is_listed_once() -> None:
    assert current(done(9), done(9), done(19), done(9)) == ["9-0", "19-0"]


@pytest.mark.parametrize("event", [None, Suspended(10, None), Resumed("token", 10, None, 2)])
def test_steps_after_the_one_gone_back_to_are_set_aside(event: Event | None) -> None:
    went_back = (done(10), done(20, 1), done(30, 1), *back_to(10, 2, event))
    assert current(*went_back) == ["10-0"] and aside(*went_back) == ["20-1", "30-1"]
    assert current(*went_back, done(20, 2), done(40, 2)) == ["10-0", "20-2", "40-2"]
    assert aside(*went_back, done(20, 2), done(40, 2)) == ["20-1", "30-1"]  # and stay that
    assert current(*went_back, done(20, 2), CheckpointsDeleted((10, 20)), done(50, 2)) == ["50-2"]


def test_a_commit_and_a_return_may_be_journalled_in_any_order() -> None:
    """The return began before the commit of the abandoned generation was journalled, or after."""
    for order in permutations([(done(20, 1),), (done(30, 1),), back_to(10, 2)]):
        events = [event for part in order for event in part]
        assert current(done(10), *events) == ["10-0"] and aside(done(10), *events) == ["20-1", "30-1"]


def test_without_a_checkpoint_the_run_goes_back_behind_all() -> None:
    assert current(done(9), *back_to(-1, 1)) == [] and aside(done(9), *back_to(-1, 1)) == ["9-0"]


def test_a_repeated_step_replaces_the_first_one_and_later_steps_are_dropped() -> None:
    """Survivors went on from step 15, in their memory, though checkpoints of 20 and 30 were there."""
    events = (done(10), done(20), done(30))
    assert current(*events, done(20, 1)) == ["10-0", "20-1"]
    records = after(*events, done(20, 1))
    assert [record.name for record in records.set_aside] == ["30-0"]
    assert "20-0" not in records.names  # which nothing names any more
    assert current(*events, done(20, 1), done(30, 1)) == ["10-0", "20-1", "30-1"]
    for order in permutations([done(20), done(30), done(20, 1)]):
        assert current(done(10), *order) == ["10-0", "20-1"]


def test_decisions_change_nothing_but_where_the_run_goes_back() -> None:
    state = RunState(DesiredRunState(0, 1), checkpoint_done=9, checkpoint_generation=3)
    assert current(done(9, 3), done(19, 3), StateDecided(state)) == ["9-3", "19-3"]
    assert current(done(9, 3), done(19, 3), *back_to(9, 5), StateDecided(replace(state, seq=1))) == ["9-3"]


def test_records_are_stored_and_recalled() -> None:
    records = after(done(10), done(20), *back_to(10, 1), done(20, 1))
    assert from_plain(CheckpointRecords, json.loads(json.dumps(to_plain(records)))) == records
