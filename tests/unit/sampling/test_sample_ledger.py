import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sampling.sample_ledger import AuditResult, audit


def filled(sizes: list[int]) -> list[tuple[int, int, int]]:
    """The records of steps that consume this many positions each."""
    return [(step, sum(sizes[:step]), size) for step, size in enumerate(sizes)]


@given(sizes=st.lists(st.integers(1, 5), max_size=40))
def test_consecutive_steps_pass_the_audit(sizes: list[int]) -> None:
    assert audit(filled(sizes)) == AuditResult(True, (), len(sizes), sum(sizes))


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
    records = filled(sizes)
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
