"""A cluster of which a user reaches nothing but the HTTP port of its Jobs API, with runs as users have them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.protocol.status import RunPhase
from tests.support.far import Far, far_cluster, until_stored

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    with far_cluster(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("laptop")) as far:
        yield far


def test_a_job_is_sent_steered_and_stopped(far: Far, texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    job = far.job(texts, storage, "distant")
    dry = far("submit", job, "--dry-run")
    assert "Nothing was started" in dry.stderr and not storage.exists()
    submitted = far("submit", job, "--workers", "2..3", "--set", "eval.every=5")
    assert submitted.stdout == "distant\n" and "is submitted as job distant-" in submitted.stderr
    run_dir = storage / "distant"
    until_stored(run_dir, lambda s: s.step > 5)
    assert json.loads(far("status", "distant", "-o", "json").stdout)["workers_now"] == 2
    told = far("submit", job, expect=2).stderr.splitlines()
    assert told[0].endswith("a run's name must be new in its storage") and told[2:] == ["Nothing was started."]
    far("scale", "distant", "-w", "3")
    until_stored(run_dir, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    assert "generation_planned" in far("events", "distant").stdout
    assert "no run 'distand'" in far("status", "distand", expect=102).stderr

    (job_id,) = set(re.findall(r"submission_id='(distant-[^']+)'", far.ray("list")))
    assert "generation" in far.ray("logs", job_id)
    far.ray("stop", job_id, "--no-wait")
    ended = until_stored(run_dir, lambda s: s.phase is RunPhase.STOPPED)
    assert ended.checkpoint_step == ended.step - 1
    assert json.loads(far("check", "data", "distant", "-o", "json").stdout)["ok"]
    commands = set(re.findall(r"submission_id='(command-[^']+)'", far.ray("list")))
    assert len(commands) <= 3  # of the six until now: those before are forgotten
    assert len(list((storage / ".packages").iterdir())) == 1  # the code of the run that was not refused


def test_a_wrong_token_is_an_error(far: Far, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0" * 64)
    assert "refused this process" in Far(far.directory, far.url, far.record, str(token))("ls", expect=77).stderr


def test_a_directory_that_is_too_large_is_not_sent(far: Far, texts: Path, tmp_path: Path) -> None:
    large = Far(tmp_path, far.url, far.record)
    job = large.job(texts, tmp_path / "shared", "heavy")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(600 << 20)
    told = large("submit", job, expect=2).stderr
    assert "can't be sent to the cluster" in told and "Nothing was started." in told
    assert not (tmp_path / "shared").exists() and "heavy-" not in far.ray("list")


def test_a_missing_secret_ends_the_run_and_leaves_nothing(far: Far, texts: Path, tmp_path: Path) -> None:
    job = far.job(texts, tmp_path / "shared", "careless", secrets={"API_KEY": "env:NO_SUCH_KEY"})
    far("submit", job)
    ended = until_stored(tmp_path / "shared" / "careless", lambda s: s.phase is RunPhase.FAILED)
    assert "secret API_KEY is to come from the environment variable NO_SUCH_KEY" in str(ended.error)
    (listed,) = [run for run in json.loads(far("ls", "-o", "json").stdout) if run["run_id"] == "careless"]
    assert listed["phase"] == "failed" and listed["workers_now"] == 0
