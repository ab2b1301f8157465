"""Start of a controller on a run's storage, in a directory and in a bucket."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from orchestrator.checkpoint.read import read_manifest
from orchestrator.controller.startup import open_run
from orchestrator.errors import TermSuperseded
from orchestrator.protocol.messages import Restore, ResumeRequest
from orchestrator.protocol.status import RunPhase
from orchestrator.run_records.final_status import has_ended
from orchestrator.run_records.job_files import write_job
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import RunHistory
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, location_of, objects_at
from orchestrator.storage.chain import HistoryName, entry_key, state_key
from orchestrator.storage.log_file import flush_logs
from orchestrator.storage.storage_process import StorageProcess
from orchestrator.storage.tasks import run_inline
from tests.support.checkpoints import write_checkpoint
from tests.support.held_objects import HeldObjects
from tests.support.request_proxy import RequestProxy
from tests.unit.policy.imagined import record

JOB = JobSpec.model_validate({"schema": "v1", "name": "demo", "train": {"max_steps": 30}})
number = count()


@pytest.fixture(params=["directory", "bucket"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, bucket: tuple[str, RequestProxy]) -> Location:
    location = tmp_path if request.param == "directory" else BucketUrl(bucket[0]) / f"started-{next(number)}"
    write_job(location / "demo", JOB.model_dump_json(by_alias=True), "name: demo\n")
    return location / "demo"


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = list(logging.getLogger("orchestrator").handlers)
    yield
    logging.getLogger("orchestrator").handlers[:] = before


def test_a_run_begins_is_restarted_ends_and_is_resumed(run_dir: Location) -> None:
    process = StorageProcess("startup")
    first = open_run("demo", run_dir, None, None, process.call)
    assert first.job == JOB and first.memory.term == 1
    logging.getLogger("orchestrator.control").info("generation 1")
    run_inline(first.memory.absorb([record(0), record(1)], up_to=10**9))
    again = open_run("demo", run_dir, None, None, process.call)
    assert again.memory.term == 2 and again.memory.progress.watermark == 1
    assert RunFiles(run_dir).status().phase is RunPhase.QUEUED
    run_inline(again.memory.conclude("{}"))
    assert has_ended(run_dir)
    resumed = open_run("demo", run_dir, ResumeRequest("resume", None), None, process.call)
    assert resumed.memory.term == 3 and not has_ended(run_dir)
    assert resumed.memory.progress.watermark == -1  # without a checkpoint it begins anew
    assert open_run("demo", run_dir, ResumeRequest("resume", None), None, process.call).memory.term == 4
    flush_logs(30.0)
    lines = list(RunFiles(run_dir).logs(source="controller"))
    assert any(line.text.endswith("generation 1") for line in lines)
    assert [event["kind"] for event in RunFiles(run_dir).events()] == ["resumed"]
    assert "job.json" in objects_at(run_dir).names("")
    process.close()


def test_other_code_that_a_run_was_resumed_with_stays_its_code(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "demo"
    write_job(run_dir, JOB.model_dump_json(by_alias=True), "")
    run_inline(open_run("demo", run_dir, None, None).memory.conclude("{}"))
    code = {"/home/user/code": "0" * 64}
    resumed = open_run("demo", run_dir, ResumeRequest("mended", None, code=code), None)
    assert resumed.job == JOB.model_copy(update={"code": code})
    run_inline(resumed.memory.conclude("{}"))
    again = open_run("demo", run_dir, ResumeRequest("again", None), None)
    assert again.job.code == code and again.memory.code == code
    other = RunHistory(run_dir, again.limits, is_read=False)
    other.restore(again.memory.stored())
    assert other.code == code


KILLED_IN_A_WRITE = """
import os, signal, sys
from pathlib import Path
from orchestrator.storage.directory import DirectoryObjects
os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
DirectoryObjects(Path(sys.argv[1])).create(sys.argv[2], b"half")
"""


def test_the_next_controller_deletes_what_killed_ones_left_half_written_and_spares_later_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "demo"
    write_job(run_dir, JOB.model_dump_json(by_alias=True), "name: demo\n")
    first = open_run("demo", run_dir, None, None)  # entries 0 and 1
    later = entry_key(99)
    for key in (entry_key(0), entry_key(2), state_key(1), HistoryName(0, 1).key, later):
        assert subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, run_dir, key]).returncode == -signal.SIGKILL
    assert len(list(run_dir.glob("journal/.*.partial"))) == 5
    link = os.link

    def link_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        assert open_run("demo", run_dir, None, None).memory.term == 2
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    with pytest.raises(TermSuperseded):  # its own file was deleted too
        run_inline(first.memory.absorb([record(0)], up_to=10**9))
    assert [f"journal/{path.name.split('.')[1]}" for path in run_dir.glob("journal/.*.partial")] == [later]
    assert open_run("demo", run_dir, None, None).memory.term == 3


def test_a_restarted_controller_leaves_a_run_to_its_new_cluster(run_dir: Location, tmp_path: Path) -> None:
    here, there = HeldObjects(tmp_path / "here"), HeldObjects(tmp_path / "there")
    assert open_run("demo", run_dir, None, None, kept=here, cluster="one").memory.term == 1
    assert open_run("demo", run_dir, None, None, kept=here, cluster="one").memory.term == 2  # restarted
    over = ResumeRequest("over", None)  # of a user of the other cluster
    for term in (3, 4):  # and restarted there
        assert open_run("demo", run_dir, over, None, kept=there, cluster="two").memory.term == term
    with pytest.raises(TermSuperseded) as refused:
        open_run("demo", run_dir, None, None, kept=here, cluster="one")
    assert refused.value.cluster == "two"
    back = ResumeRequest("back", None)
    assert open_run("demo", run_dir, back, None, kept=here, cluster="one").memory.term == 5
    with pytest.raises(TermSuperseded):
        open_run("demo", run_dir, over, None, kept=there, cluster="two")
    assert open_run("demo", run_dir, back, None, kept=here, cluster="one").memory.resumed_by == "back"


def test_a_run_continued_in_another_cluster_resumes_from_its_newest_checkpoint(
    run_dir: Location, tmp_path: Path
) -> None:
    first = open_run("demo", run_dir, None, None, cluster="one")
    run_inline(first.memory.absorb([record(step) for step in range(10)], up_to=10**9))
    journal = first.memory._journal
    chosen, newest = (str(write_checkpoint(run_dir, step, journal=journal)) for step in (3, 7))
    process = StorageProcess("resumed")
    over = ResumeRequest("over", Restore(3, chosen))
    resumed = open_run("demo", run_dir, over, None, process.call, cluster="two")
    assert resumed.memory.state.restore == Restore(7, newest, digest=read_manifest(location_of(newest)).digest)
    process.close()
    named = ResumeRequest("named", Restore(3, chosen), is_named=True)
    assert open_run("demo", run_dir, named, None, cluster="three").memory.state.restore == Restore(3, chosen)


def test_a_run_keeps_the_checkpoint_of_its_order_where_none_is_better(run_dir: Location, tmp_path: Path) -> None:
    first = open_run("demo", run_dir, None, None, cluster="one")
    run_inline(first.memory.absorb([record(step) for step in range(10)], up_to=10**9))
    chosen, newest = (write_checkpoint(run_dir, step, journal=first.memory._journal) for step in (3, 7))
    order = ResumeRequest("here", Restore(3, str(chosen)))
    assert open_run("demo", run_dir, order, None, cluster="one").memory.state.restore == order.restore
    for checkpoint in (chosen, newest):
        objects_at(checkpoint).delete(["manifest.json"])
    order = ResumeRequest("there", Restore(3, str(chosen)))
    assert open_run("demo", run_dir, order, None, cluster="two").memory.state.restore == order.restore
