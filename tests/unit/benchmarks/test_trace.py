"""Reports of ranks are read as they arrive."""

from dataclasses import replace
from pathlib import Path

from benchmarks.support.trace import FinishedStep, Trace

STEP = FinishedStep(step=0, rank=0, size=2, pid=7, end_time=1.5, loss=4.0)


def test_steps_are_read_as_they_come(tmp_path: Path) -> None:
    reader, writer = Trace(tmp_path), Trace(tmp_path)
    assert reader.steps() == []
    writer.finish(STEP)
    assert reader.steps() == [STEP]
    writer.finish(replace(STEP, step=1))
    assert reader.steps() == [STEP, replace(STEP, step=1)]


def test_a_line_that_is_not_whole_waits(tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    trace.finish(STEP)
    whole = (tmp_path / "steps").read_bytes()
    (tmp_path / "steps").write_bytes(whole + whole[:9])
    assert trace.steps() == [STEP]
    (tmp_path / "steps").write_bytes(whole + whole)
    assert trace.steps() == [STEP, STEP]


def test_notices_and_the_request_to_stop_reach_others(tmp_path: Path) -> None:
    reader, writer = Trace(tmp_path), Trace(tmp_path)
    assert reader.notice_times() == [] and not reader.is_stopping()
    writer.notice()
    writer.stop()
    assert len(reader.notice_times()) == 1 and reader.is_stopping()
