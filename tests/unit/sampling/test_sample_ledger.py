import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import ProtocolError
from orchestrator.sampling.sample_ledger import AuditResult, SampleLedger, StepRange, audit


def filled(*sizes: int) -> SampleLedger:
    ledger = SampleLedger()
    for size in sizes:
        ledger.append(ledger.next_step, ledger.next_position, size)
    return ledger


@given(sizes=st.lists(st.integers(1, 5), max_size=40))
def test_what_the_ledger_took_passes_the_audit(sizes: list[int]) -> None:
    ledger = filled(*sizes)
    records = list(ledger.records())
    assert [record.num_positions for record in records] == sizes
    assert audit(records) == AuditResult(True, (), len(sizes), sum(sizes))


@pytest.mark.parametrize(
    ("step", "first_position", "num_positions"),
    [
        pytest.param(1, 4, 4, id="step again"),
        pytest.param(3, 8, 4, id="step left out"),
        pytest.param(2, 7, 4, id="position again"),
        pytest.param(2, 9, 4, id="position left out"),
        pytest.param(2, 8, 0, id="nothing consumed"),
    ],
)
def test_an_entry_that_does_not_follow_is_refused(step: int, first_position: int, num_positions: int) -> None:
    ledger = filled(4, 4)
    with pytest.raises(ProtocolError, match="doesn't follow the ledger"):
        ledger.append(step, first_position, num_positions)
    assert (ledger.next_step, ledger.next_position) == (2, 8)


def test_a_restored_ledger_goes_on() -> None:
    restored = SampleLedger()
    restored.load_state_dict(json.loads(json.dumps(filled(4, 4, 6).state_dict())))
    restored.append(3, 14, 6)
    assert list(restored.records()) == list(filled(4, 4, 6, 6).records())


def test_a_long_run_is_a_short_account() -> None:
    assert len(filled(*[16] * 1000).state_dict()["stretches"]) == 1


def stretch(**changes: int) -> dict[str, int]:
    return {"first_step": 0, "num_steps": 2, "first_position": 0, "positions_per_step": 4} | changes


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"stretches": [{"first_step": 0}]}, id="fields missing"),
        pytest.param({"stretches": [stretch(first_position=4)]}, id="beginning left out"),
        pytest.param({"stretches": [stretch(), stretch(first_step=2, first_position=9)]}, id="gap"),
        pytest.param({"stretches": [stretch(num_steps=0)]}, id="empty stretch"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state: dict[str, Any]) -> None:
    ledger = filled(4)
    with pytest.raises(ProtocolError, match="ledger doesn't fit"):
        ledger.load_state_dict(state)
    assert list(ledger.records()) == [StepRange(0, 0, 4)]


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        pytest.param([(0, 0, 4), (1, 4, 4), (1, 4, 4)], "step 1 was committed again", id="step twice"),
        pytest.param([(0, 0, 4), (2, 4, 4)], "where step 1 was due", id="step left out"),
        pytest.param([(1, 0, 4)], "where step 0 was due", id="first step left out"),
        pytest.param([(0, 0, 4), (1, 5, 4)], "positions from 4 on were left out", id="gap"),
        pytest.param([(0, 0, 4), (1, 3, 4)], "positions up to 4 were consumed", id="overlap"),
        pytest.param([(0, 2, 4)], "positions from 0 on were left out", id="first positions left out"),
        pytest.param([(0, 0, 4), (1, 4, 0)], "consumed 0 positions", id="empty step"),
        pytest.param([(1, 4, 4), (0, 0, 4)], "step 0 was committed again, or late", id="disorder"),
    ],
)
def test_the_audit_names_what_is_wrong(records: list[tuple[int, int, int]], problem: str) -> None:
    result = audit(records)
    assert not result.ok
    assert any(problem in found for found in result.problems), result.problems


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=20), data=st.data())
def test_no_single_change_to_a_good_account_passes(sizes: list[int], data: st.DataObject) -> None:
    records = [tuple(record) for record in filled(*sizes).records()]
    where = data.draw(st.integers(0, len(records) - 2))
    match data.draw(st.sampled_from(["drop", "repeat", "swap", "shift", "shrink"])):
        case "drop":
            del records[where]
        case "repeat":
            records.insert(where, records[where])
        case "swap":
            records[where], records[where + 1] = records[where + 1], records[where]
        case "shift":
            step, first, count = records[where]
            records[where] = (step, first + 1, count)
        case "shrink":
            step, first, count = records[where]
            records[where] = (step, first, count - 1)
    assert not audit(records).ok
