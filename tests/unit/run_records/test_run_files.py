import time
from datetime import datetime
from pathlib import Path

import pytest

from orchestrator.errors import NotFound
from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_files import RunFiles, run_dir_in
from orchestrator.spec.job import JobSpec
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import record


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    Journal(DirectoryObjects(tmp_path))
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


def test_logs_of_one_process_and_the_newest_lines_only(run_dir: Path) -> None:
    (run_dir / "logs" / "w0.log").write_text("2026-01-01 10:00:00,100 INFO one\n2026-01-01 10:00:00,300 INFO three\n")
    (run_dir / "logs" / "w1.log").write_text("2026-01-01 10:00:00,200 INFO two\n")
    files = RunFiles(run_dir)
    assert [line.text for line in files.logs(source="w0")] == ["INFO one", "INFO three"]
    assert [line.text for line in files.logs(tail=2)] == ["INFO two", "INFO three"]
    assert [line.text for line in files.logs(tail=9)] == ["INFO one", "INFO two", "INFO three"]
    assert list(files.logs(tail=0)) == []
    assert [line.text for line in files.logs(since_s=datetime(2026, 1, 1, 10, 0, 1).timestamp())] == []
    assert len(list(files.logs(since_s=datetime(2026, 1, 1, 10).timestamp()))) == 3
    with pytest.raises(NotFound, match=r"no log of 'w7'.*logs of w0, w1"):
        list(files.logs(source="w7"))


def test_events_leave_out_the_bookkeeping(run_dir: Path) -> None:
    Journal(DirectoryObjects(run_dir)).append(
        [{"kind": "submitted"}, {"kind": "state", "state": {}}, {"kind": "ended"}]
    )
    files = RunFiles(run_dir)
    assert [event["kind"] for event in files.events()] == ["submitted", "ended"]
    assert [event["kind"] for event in files.events(tail=1)] == ["ended"]
    assert [event["kind"] for event in files.events_to_come(lambda: True, tail=1)] == ["ended"]
    assert files.events(since_s=time.time() + 1.0) == []


def test_the_status_of_a_run_whose_cluster_is_gone_is_that_of_its_journal(run_dir: Path) -> None:
    job = JobSpec.model_validate({"name": "lost", "train": {"max_steps": 30}})
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    memory = JournaledRun(run_dir, RunLimits.of("lost", job))
    run_inline(memory.absorb([record(0), record(1)], up_to=10_000))
    status = RunFiles(run_dir).status()
    assert (status.phase, status.step, status.steps) == (RunPhase.STARTING, 2, 30)
    assert "has not ended" in status.why


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no run.*Name the run storage"):
        RunFiles(tmp_path / "nothing")


def test_runs_of_like_names_are_named(tmp_path: Path) -> None:
    for name in ("books", "books-2", "other"):
        (tmp_path / name).mkdir()
        Journal(DirectoryObjects(tmp_path / name))
    with pytest.raises(NotFound, match="Did you mean `books` or `books-2`?"):
        RunFiles(tmp_path / "bookz")
    with pytest.raises(NotFound, match="holds no run. Name the run storage"):
        RunFiles(tmp_path / "x")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", ".data", "a/b", "", "A"])
def test_a_name_that_leads_out_of_the_storage_is_no_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound, match="no run can be called"):
        run_dir_in(tmp_path, name)
    assert run_dir_in(tmp_path, "mine") == tmp_path / "mine"
