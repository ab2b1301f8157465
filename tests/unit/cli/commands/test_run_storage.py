"""`ls`, `status`, `wait`, `rm`, `checkpoint rm` on run storage, without a cluster."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.run_records.run_history import STATUS_FILE
from orchestrator.run_records.status import to_json
from orchestrator.spec.job import JobSpec
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


def end(storage: Path, phase: RunPhase) -> None:
    ended = replace(status(phase=phase), run_id="books", run_dir=str(storage / "books"), why="it was asked to")
    (storage / "books" / STATUS_FILE).write_text(to_json(ended))


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
    assert done.returncode == 101 and "there is no cluster" in done.stderr
    assert orchestrator("wait", "nobody").returncode == 102


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


def test_files_that_can_not_be_removed_are_a_storage_error(
    runs: Path, orchestrator: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    done = orchestrator("rm", "books", "--yes")
    assert done.returncode == 104 and "Permission denied" in done.stderr and "Nothing was removed." in done.stderr


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
