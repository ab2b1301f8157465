from pathlib import Path

import pytest

from orchestrator.control.journal import Journal, acquire_epoch
from orchestrator.control.run_files import RunFiles
from orchestrator.errors import NotFound


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    acquire_epoch(tmp_path)
    return tmp_path


def test_log_lines_are_merged_by_time_and_keep_their_continuations(run_dir: Path) -> None:
    (run_dir / "logs" / "w0.log").write_text("2026-01-01 10:00:00,200 INFO two\nTraceback:\n  more\n")
    (run_dir / "logs" / "w1.log").write_text("2026-01-01 10:00:00,100 INFO one\n2026-01-01 10:00:00,300 INFO three\n")
    lines = list(RunFiles(run_dir).logs())
    assert [line.source for line in lines] == ["w1", "w0", "w1"]
    assert [line.text for line in lines] == ["INFO one", "INFO two\nTraceback:\n  more", "INFO three"]


def test_following_reads_on_until_the_run_is_over_and_shows_whole_lines_once(run_dir: Path) -> None:
    log = run_dir / "logs" / "w0.log"
    log.write_text("2026-01-01 10:00:00,100 INFO one\n2026-01-01 10:00:00,2")
    looks = iter([False, True])

    def is_over() -> bool:
        over = next(looks)
        if over:
            with log.open("a") as file:
                file.write("00 INFO two\n")
            (run_dir / "logs" / "w1.log").write_text("2026-01-01 10:00:00,300 INFO late\n")
        return over

    assert [line.text for line in RunFiles(run_dir).logs(is_over)] == ["INFO one", "INFO two", "INFO late"]


def test_events_leave_out_the_bookkeeping(run_dir: Path) -> None:
    Journal(run_dir, 1).append([{"kind": "submitted"}, {"kind": "state", "state": {}}, {"kind": "ended"}])
    files = RunFiles(run_dir)
    assert [event["kind"] for event in files.events()] == ["submitted", "ended"]
    assert [event["kind"] for event in files.events(after=0)] == ["ended"]


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no run"):
        RunFiles(tmp_path / "nothing")
