"""`ls`, `status`, `wait`, `rm`, `checkpoint rm` on run storage, without a cluster."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cli.terminal import run_lookup
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.final_status import status_key
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.status import to_json
from orchestrator.spec.job import JobSpec
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import objects_at
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from tests.support.buckets import s3_bucket
from tests.support.checkpoints import write_checkpoint
from tests.unit.cli.statuses import status
from tests.unit.cli.test_main import Done, here, orchestrator
from tests.unit.policy.stories import Story, eventful, write

__all__ = ["here", "orchestrator"]  # fixtures

JOB = JobSpec.model_validate({"schema": "v1", "name": "try", "resources": {"gpus": 1}})
Command = Callable[..., Done]


@pytest.fixture
def runs(here: Path) -> Path:
    """Run storage with `books`, which has ended, and `poems`, which has not."""
    storage = here / "runs"
    write(eventful(), storage / "books", JOB)
    end(storage, RunPhase.SUCCEEDED)
    story = Story()
    story.start(2)
    story.train(30)
    write(story, storage / "poems", JOB)
    return storage


@pytest.fixture
def bucket(runs: Path) -> Iterator[str]:
    """The same runs in a bucket."""
    with s3_bucket() as (url, _):
        storage = BucketUrl(f"{url}/of-{runs.parent.name}")
        for path in runs.rglob("*"):
            if path.is_file():
                objects_at(storage).create(path.relative_to(runs).as_posix(), path.read_bytes())
        yield str(storage)


def end(storage: Path, phase: RunPhase, run: str = "books") -> None:
    ended = replace(status(phase=phase), run_id=run, run_dir=str(storage / run), why="it was asked to")
    (storage / run / status_key(1)).write_text(to_json(ended))


def test_runs_are_listed_without_a_cluster(runs: Path, orchestrator: Command) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "job.json").write_text("{")
    for arguments in (["ls"], ["ls", "--storage", "runs"]):
        done = orchestrator(*arguments, "-o", "json")
        listed = {found.run_id: found for found in (from_plain(RunStatus, plain) for plain in json.loads(done.stdout))}
        assert done.returncode == 0 and set(listed) == {"books", "poems"}
        assert listed["books"].phase is RunPhase.SUCCEEDED and not listed["poems"].phase.ended
        assert "Run broken is left out" in done.stderr and "Traceback" not in done.stderr
    assert orchestrator("ls", "--storage", "nowhere").returncode == 102
    assert orchestrator("ls", "--address", "127.0.0.1:1").returncode == 69


@pytest.mark.parametrize(
    ("phase", "code"),
    [(RunPhase.SUCCEEDED, 0), (RunPhase.FAILED, 100), (RunPhase.STOPPED, 103), (RunPhase.PAUSED, 101)],
)
def test_wait_exits_with_the_runs_code(runs: Path, orchestrator: Command, phase: RunPhase, code: int) -> None:
    end(runs, phase)
    done = orchestrator("wait", "books")
    assert done.returncode == code and done.stdout.startswith(f"books {phase}")
    assert json.loads(orchestrator("wait", "books", "-o", "json").stdout)["phase"] == phase


def test_wait_for_a_run_that_no_cluster_has(runs: Path, orchestrator: Command) -> None:
    done = orchestrator("wait", "poems")
    assert done.returncode == 101 and "no cluster that has it was found" in done.stderr
    assert orchestrator("wait", "nobody").returncode == 102


@pytest.mark.parametrize("timeout", [[], ["--timeout", "600"]])
def test_wait_reads_named_storage_until_the_run_has_ended(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch, timeout: list[str]
) -> None:
    phases, read = [], RunFiles.status

    def then_end(files: RunFiles) -> RunStatus:
        found = read(files)
        phases.append(found.phase)
        end(runs, RunPhase.STOPPED, "poems")
        return found

    monkeypatch.setattr(RunFiles, "status", then_end)
    done = orchestrator("wait", "poems", "--storage", "runs", *timeout)
    assert done.returncode == 103 and done.stdout.startswith("poems stopped")
    assert phases == [RunPhase.STARTING, RunPhase.STOPPED]


def test_wait_for_named_storage_ends_with_the_timeout_or_if_nothing_writes_the_journal(
    runs: Path, orchestrator: Command
) -> None:
    for entry in (runs / "poems" / "journal").iterdir():
        written_s = time.time() - 500.0
        os.utime(entry, (written_s, written_s))
    done = orchestrator("wait", "poems", "--storage", "runs", "--timeout", "0.1")
    assert done.returncode == 101 and "is starting after 0.1 s of waiting" in done.stderr
    done = orchestrator("wait", "poems", "--storage", "runs")
    assert done.returncode == 101 and "has not been written for 120 s" in done.stderr
    assert "orchestrator resume poems" in done.stderr and "--timeout" in done.stderr


@pytest.mark.parametrize(
    ("command", "first", "last"),
    [
        ("events poems -f", '"kind":"submitted"', '"kind":"ended"'),
        ("logs poems -f", '"text":"INFO begun"', '"text":"INFO stopped"'),
        ("status poems --watch", '"phase":"starting"', '"phase":"stopped"'),
    ],
)
def test_a_run_of_named_storage_is_followed_to_its_end(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch, command: str, first: str, last: str
) -> None:
    log, looks, read = runs / "poems" / "logs" / "controller.log", [], RunFiles.has_ended
    log.parent.mkdir()
    log.write_text("2026-01-01 00:00:00.000 INFO begun\n")

    def then_end(files: RunFiles) -> bool:
        looks.append(read(files))
        if len(looks) == 2:
            Journal(DirectoryObjects(runs / "poems")).append([{"kind": "ended", "outcome": "stopped", "reason": ""}])
            with log.open("a") as lines:
                lines.write("2026-01-01 00:00:01.000 INFO stopped\n")
            end(runs, RunPhase.STOPPED, "poems")
        return looks[-1]

    monkeypatch.setattr(RunFiles, "has_ended", then_end)
    done = orchestrator(*command.split(), "--storage", "runs", "-o", "json")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and first in lines[0] and last in lines[-1], done
    assert looks[:2] == [False, False]


def test_a_run_is_removed_once_that_is_confirmed(runs: Path, orchestrator: Command) -> None:
    refused = orchestrator("rm", "books")
    assert refused.returncode == 2 and "Pass --yes" in refused.stderr and (runs / "books").is_dir()
    removed = orchestrator("rm", "books", "--yes", "-o", "json")
    assert json.loads(removed.stdout) == {"run_id": "books", "run_dir": str(runs / "books")}
    assert [path.name for path in runs.iterdir()] == ["poems"]
    assert orchestrator("rm", "books", "--yes").returncode == 102


def test_a_run_that_has_not_ended_is_not_removed(runs: Path, orchestrator: Command) -> None:
    for options in (["--yes"], ["--yes", "--tracking"]):
        refused = orchestrator("rm", "poems", *options)
        assert refused.returncode == 2 and "run poems has not ended" in refused.stderr
        assert "orchestrator stop poems" in refused.stderr and "Nothing was removed." in refused.stderr
    assert (runs / "poems" / "job.json").exists()


@pytest.mark.parametrize("options", [[], ["--tracking"]])
def test_a_run_active_in_the_cluster_is_not_removed_though_storage_has_its_end(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """It was resumed just now, and no controller has opened it yet."""
    in_cluster = status(run_id="books", run_dir=str(runs / "books"), phase=RunPhase.STARTING)

    class Cluster:
        def __init__(self, address: str | None) -> None:
            assert address == "10.0.0.5:6379"

        def get(self, run_id: str) -> RunStatus:
            return in_cluster

    monkeypatch.setattr(run_lookup, "OrchestratorClient", Cluster)
    monkeypatch.setattr(run_lookup, "remove_tracked", lambda run_dir: pytest.fail(f"{run_dir} is gone from MLflow"))
    command = ["rm", "books", "--yes", "--storage", "runs", "--address", "10.0.0.5:6379"]
    refused = orchestrator(*command, *options)
    assert refused.returncode == 2 and "run books has not ended: it is starting" in refused.stderr
    assert "orchestrator stop books" in refused.stderr and "Nothing was removed." in refused.stderr
    assert (runs / "books" / "job.json").exists()
    in_cluster = replace(in_cluster, run_dir="/elsewhere/books")
    assert orchestrator(*command).returncode == 0 and not (runs / "books").exists()


def test_files_that_can_not_be_removed_are_a_storage_error(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    done = orchestrator("rm", "books", "--yes")
    assert done.returncode == 104 and "Permission denied" in done.stderr and "Nothing was removed." in done.stderr


READS = ["status", "wait", "events", "logs", "report", "check data", "checkpoint ls", "rm --yes"]


def on(command: str, run: str) -> list[str]:
    verb, _, options = command.partition(" --")
    return [*verb.split(), run, "--storage", "runs", *([f"--{options}"] if options else [])]


@pytest.mark.parametrize("call", ["get", "names"])
@pytest.mark.parametrize("command", READS)
def test_run_storage_that_can_not_be_read_exits_104(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch, command: str, call: str
) -> None:
    (runs / "books" / "logs").mkdir()
    (runs / "books" / "logs" / "controller.log").write_text("2026-01-01 00:00:00.000 INFO begun\n")

    def fail(objects: DirectoryObjects, key: str, *_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(runs / "books" / key))

    monkeypatch.setattr(DirectoryObjects, call, fail)
    done = orchestrator(*on(command, "books"))
    assert done.returncode == 104 and "books can't be read: Input/output error" in done.stderr, done.stderr
    assert "Nothing was changed." in done.stderr and "Traceback" not in done.stderr
    assert (runs / "books" / "job.json").exists()


@pytest.mark.parametrize("command", ["status", "wait", "logs", "rm --yes"])
def test_a_final_status_that_is_cut_off_exits_104_and_names_its_file(
    runs: Path, orchestrator: Command, command: str
) -> None:
    cut = runs / "books" / status_key(1)
    cut.write_bytes(cut.read_bytes()[:-9])
    done = orchestrator(*on(command, "books"))
    assert done.returncode == 104 and f"{cut} can't be read" in done.stderr and "Traceback" not in done.stderr
    assert cut.exists() and (runs / "books" / "job.json").exists()


@pytest.mark.parametrize("command", READS)
def test_a_journal_entry_with_a_flipped_byte_exits_104(runs: Path, orchestrator: Command, command: str) -> None:
    Journal(DirectoryObjects(runs / "poems"))  # its entry shows what the one before it was
    entry = runs / "poems" / "journal" / "0000000000"
    data = entry.read_bytes()
    at = len(data) // 2
    entry.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    done = orchestrator(*on(command, "poems"))
    assert done.returncode == 104 and "journal/0000000000" in done.stderr and "Traceback" not in done.stderr
    assert (runs / "poems" / "job.json").exists()


def test_a_checkpoint_is_removed_but_not_the_newest_of_an_active_run(runs: Path, orchestrator: Command) -> None:
    for run in ("books", "poems"):
        for step in (9, 19):
            write_checkpoint(runs / run, step)
    assert orchestrator("checkpoint", "rm", "books", "--step", "5", "--yes").returncode == 102
    assert orchestrator("checkpoint", "rm", "books", "--step", "9").returncode == 2  # nothing was confirmed
    assert orchestrator("checkpoint", "rm", "books", "--step", "19", "--yes").returncode == 0
    assert [path.name for path in (runs / "books" / "checkpoints").iterdir()] == ["step-00000009-000001-000000"]
    refused = orchestrator("checkpoint", "rm", "poems", "--step", "19", "--yes")
    assert refused.returncode == 2 and "has not ended and may need it" in refused.stderr
    assert orchestrator("checkpoint", "rm", "poems", "--step", "9", "--yes").returncode == 0


# -- the same in a bucket ----------------------------------------------------------------------------------------------


def test_runs_in_a_bucket_are_read_as_those_in_a_directory(runs: Path, bucket: str, orchestrator: Command) -> None:
    for command in (
        ["ls", "-o", "json"],
        ["status", "poems", "-o", "json"],
        ["wait", "books", "-o", "json"],
        ["events", "books"],
        ["check", "data", "books"],
        ["report", "books", "-o", "json"],
    ):
        here, there = orchestrator(*command, "--storage", "runs"), orchestrator(*command, "--storage", bucket)
        assert here.returncode == there.returncode == 0, there.stderr
        assert there.stdout.replace(bucket, str(runs)) == here.stdout


def test_a_run_in_a_bucket_is_removed_once_it_has_ended(bucket: str, orchestrator: Command) -> None:
    refused = orchestrator("rm", "poems", "--yes", "--storage", bucket)
    assert refused.returncode == 2 and "run poems has not ended" in refused.stderr
    removed = orchestrator("rm", "books", "--yes", "--storage", bucket, "-o", "json")
    assert json.loads(removed.stdout) == {"run_id": "books", "run_dir": f"{bucket}/books"}
    assert objects_at(BucketUrl(bucket)).names("") == ("poems",)
    assert orchestrator("rm", "books", "--yes", "--storage", bucket).returncode == 102


def test_checkpoints_in_a_bucket_are_listed_verified_and_removed(
    runs: Path, bucket: str, orchestrator: Command
) -> None:
    books = BucketUrl(bucket) / "books"
    for step in (9, 19):
        path = write_checkpoint(books, step)
    options = ("books", "--storage", bucket, "-o", "json")
    listed = json.loads(orchestrator("checkpoint", "ls", *options).stdout)
    assert [found["step"] for found in listed] == [9, 19] and listed[1]["path"] == str(path)
    assert abs(listed[1]["time"] - time.time()) < 300.0
    assert json.loads(orchestrator("checkpoint", "verify", *options).stdout)["step"] == 19
    assert orchestrator("checkpoint", "rm", *options, "--step", "9", "--yes").returncode == 0
    objects = objects_at(path)
    name = next(name for name in objects.names("") if name.startswith("shard-"))
    data = objects.get(name)
    objects.delete([name])
    objects.create(name, data[:-1] + bytes([data[-1] ^ 1]))
    damaged = orchestrator("checkpoint", "verify", *options)
    assert damaged.returncode == 104 and name in damaged.stderr


def test_the_page_of_a_report_needs_a_directory(bucket: str, orchestrator: Command) -> None:
    done = orchestrator("report", "books", "--storage", bucket, "-o", "html")
    assert done.returncode == 2 and "is in a bucket" in done.stderr
    page = orchestrator("report", "books", "--storage", bucket, "-o", "html", "--out", "page.html")
    assert page.returncode == 0 and Path("page.html").exists()


def test_a_bucket_that_can_not_be_read(bucket: str, orchestrator: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["ls"], ["status", "books"]):
        done = orchestrator(*command, "--storage", "hdfs://host/runs")
        assert done.returncode == 2 and "hdfs:// is none of s3://, gs:// and az://" in done.stderr
        done = orchestrator(*command, "--storage", "s3://absent/runs")
        assert done.returncode == 104 and "there is no such bucket" in done.stderr
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for command in (["ls"], ["status", "books"]):
        done = orchestrator(*command, "--storage", f"{bucket}-without-credentials")
        assert done.returncode == 77 and "AWS_SECRET_ACCESS_KEY is not set" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_mlflow_lacks_of_a_run_in_a_bucket_is_delivered(
    bucket: str, orchestrator: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From any machine: what waits is made again from the journal."""
    objects_at(BucketUrl(bucket)).create("books/job.yaml", b"name: books\n")
    for machine in ("one", "another"):
        monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / machine))
        done = orchestrator("tracking", "sync", "books", "--storage", bucket)
        assert done.returncode == 0 and "MLflow has everything" in done.stderr, done.stderr
        artifacts = list((tmp_path / machine / "mlflow-artifacts").rglob("job.yaml"))
        assert [path.read_text() for path in artifacts] == ["name: books\n"]
    removed = orchestrator("rm", "books", "--yes", "--tracking", "--storage", bucket)
    assert removed.returncode == 0 and list((tmp_path / "another" / "tracking").iterdir()) == []


def test_a_damaged_checkpoint_is_left_out_of_the_list_and_a_removal_can_be_repeated(
    runs: Path, orchestrator: Command
) -> None:
    paths = {step: write_checkpoint(runs / "books", step) for step in (9, 19, 29)}
    (paths[9] / "manifest.json").write_text("{}")
    (paths[19] / "manifest.json").unlink()  # as a removal that was interrupted leaves it
    listed = orchestrator("checkpoint", "ls", "books", "-o", "json")
    assert listed.returncode == 0 and [found["step"] for found in json.loads(listed.stdout)] == [29]
    assert "The checkpoint of step 9 is left out" in listed.stderr and "step 19" not in listed.stderr
    assert orchestrator("checkpoint", "rm", "books", "--step", "19", "--yes").returncode == 0
    assert not paths[19].exists()
    assert orchestrator("checkpoint", "rm", "books", "--step", "19", "--yes").returncode == 102
