"""A cluster of which a user reaches nothing but the HTTP port of its Jobs API, with runs as users have them."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import local_cluster
from orchestrator.control.connection import disconnect
from orchestrator.control.run_files import RunFiles
from orchestrator.protocol.status import RunPhase, RunStatus
from tests.support.own_models import linear, own_spec
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


class Far:
    """A user with a directory, a token and a URL."""

    def __init__(self, directory: Path, url: str, token: str) -> None:
        self.directory, self.url = directory, url
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "ORCHESTRATOR_"))}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        self.env = {**kept, **auth, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": str(directory / "home")}

    def __call__(self, *args: str, expect: int = 0, module: str = "orchestrator.cli.main") -> Any:
        command = [sys.executable, "-m", module, *args, "--address", self.url]
        done = subprocess.run(command, cwd=self.directory, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == expect, f"{args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done

    def ray(self, *args: str) -> str:
        return str(self("job", *args, module="ray.scripts.scripts").stdout)


def _until(run_dir: Path, condition: Callable[[RunStatus], bool]) -> RunStatus:
    """As whoever sees run storage sees it: a question by URL takes seconds."""
    deadline_s = time.monotonic() + 120.0
    while True:
        status = RunFiles(run_dir).status()
        if condition(status):
            return status
        assert time.monotonic() < deadline_s, status
        time.sleep(0.1)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    with pytest.MonkeyPatch.context() as monkeypatch, socket.socket() as probe:
        monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path_factory.mktemp("home")))
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        up = local_cluster.up(4, jobs_port=port)
        try:
            yield Far(tmp_path_factory.mktemp("laptop"), f"http://127.0.0.1:{port}", up.record.token_path)
        finally:
            disconnect()
            local_cluster.down()


def _job(far: Far, texts: Path, storage: Path, name: str, **changes: Any) -> str:
    """A job with a model of the user's own, which lies beside it."""
    spec = own_spec(far.directory, linear())
    plain = small_job(texts, steps=100_000).model_copy(update={"name": name, "model": spec, "storage": str(storage)})
    job = plain.model_dump(mode="json", by_alias=True) | {"workers": "1..3", **changes}
    job["model"]["code_dir"] = os.path.relpath(job["model"]["code_dir"], far.directory)
    (far.directory / f"{name}.yaml").write_text(json.dumps(job))
    return f"{name}.yaml"


def test_a_job_is_sent_steered_and_stopped(far: Far, texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    job = _job(far, texts, storage, "distant")
    dry = far("submit", job, "--dry-run")
    assert "Nothing was started" in dry.stderr and not storage.exists()
    submitted = far("submit", job, "--workers", "2..3", "--set", "eval.every=5")
    assert submitted.stdout == "distant\n" and "is submitted as job distant-" in submitted.stderr
    run_dir = storage / "distant"
    _until(run_dir, lambda s: s.step > 5)
    assert json.loads(far("status", "distant", "-o", "json").stdout)["workers_now"] == 2
    told = far("submit", job, expect=2).stderr.splitlines()
    assert told[0].endswith("a run's name must be new in its storage") and told[2:] == ["Nothing was started."]
    far("scale", "distant", "-n", "3")
    _until(run_dir, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    assert "generation_planned" in far("events", "distant").stdout
    assert "no run 'distand'" in far("status", "distand", expect=102).stderr

    (job_id,) = set(re.findall(r"submission_id='(distant-[^']+)'", far.ray("list")))
    assert "generation" in far.ray("logs", job_id)
    far.ray("stop", job_id, "--no-wait")
    ended = _until(run_dir, lambda s: s.phase is RunPhase.CANCELLED)
    assert ended.checkpoint_step == ended.step - 1
    assert json.loads(far("audit", "distant", "-o", "json").stdout)["ok"]
    commands = set(re.findall(r"submission_id='(command-[^']+)'", far.ray("list")))
    assert len(commands) <= 3  # of the six until now: those before are forgotten
    assert len(list((storage / ".packages").iterdir())) == 1  # the code of the run that was not refused


def test_a_wrong_token_is_told(far: Far, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0" * 64)
    assert "refused this process" in Far(far.directory, far.url, str(token))("list", expect=77).stderr


def test_a_directory_that_is_too_large_is_not_sent(far: Far, texts: Path, tmp_path: Path) -> None:
    large = Far(tmp_path, far.url, far.env["RAY_AUTH_TOKEN_PATH"])
    job = _job(large, texts, tmp_path / "shared", "heavy")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(600 << 20)
    told = large("submit", job, expect=2).stderr
    assert "can't be sent to the cluster" in told and "Nothing was started." in told
    assert not (tmp_path / "shared").exists() and "heavy-" not in far.ray("list")


def test_a_secret_that_is_not_there_ends_the_run_and_leaves_nothing(far: Far, texts: Path, tmp_path: Path) -> None:
    job = _job(far, texts, tmp_path / "shared", "careless", secrets={"API_KEY": "env:NO_SUCH_KEY"})
    far("submit", job)
    ended = _until(tmp_path / "shared" / "careless", lambda s: s.phase is RunPhase.FAILED)
    assert "secret API_KEY is to come from the environment variable NO_SUCH_KEY" in str(ended.error)
    (listed,) = [run for run in json.loads(far("list", "-o", "json").stdout) if run["run_id"] == "careless"]
    assert listed["phase"] == "failed" and listed["workers_now"] == 0
