from dataclasses import dataclass, replace

import pytest

from orchestrator.protocol.changes import changed, read
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import Report, TransitionReport

REPORT = Report("w0", 1, 0, Phase.COLD, -1, -1, -1)
RECORD = StepRecord(0, 0, 1, 4.0, BatchRecord(8, 0, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.5, 9.0))


def test_a_change_reaches_the_part_that_has_the_field() -> None:
    new = changed(REPORT, phase=Phase.READY, prepared=3, stopped=2, committed=7)
    assert (new.phase, new.transition) == (Phase.READY, TransitionReport(prepared=3, stopped=2))
    assert new.protection.committed == 7 and new.protection.settled == -1
    assert new.health is REPORT.health
    assert changed(RECORD, step_s=1.0, loss=2.0) == replace(RECORD, loss=2.0, timing=StepTiming(1.0, 9.0))


def test_a_whole_part_and_a_field_of_it_can_change_together() -> None:
    new = changed(REPORT, transition=TransitionReport(prepared=3), stopped=1)
    assert new.transition == TransitionReport(prepared=3, stopped=1)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(KeyError, match="colour"):
        changed(REPORT, colour="red")


@pytest.mark.parametrize("value", [REPORT, RECORD], ids=["report", "record"])
def test_fields_of_parts_have_names_of_their_own(value: Report | StepRecord) -> None:
    assert changed(value) == value
    assert read(REPORT, "prepared") == -1 and read(RECORD, "vote_time") == 9.0


def test_two_fields_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice:
        batch: BatchRecord
        tokens: int

    with pytest.raises(TypeError, match="tokens"):
        changed(Twice(BatchRecord(8, 0, 1), 3), tokens=4)
