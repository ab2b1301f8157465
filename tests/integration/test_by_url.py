"""A cluster of which a user reaches nothing but the HTTP port of its Jobs API: the Python API, commands, and what is
refused or interrupted, of which nothing is left."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental import internal_kv

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.connection import connect
from orchestrator.errors import NameTaken, NotFound, UsageError
from orchestrator.protocol.status import RunPhase
from orchestrator.spec.job import JobSpec
from tests.support.far import Far, far_cluster, until_stored
from tests.support.hosts import until
from tests.support.own_models import linear

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]
SOON_S = 100.0
SECRET = "correct-horse-battery"
TELLS = linear(
    init="self.calls = 0",
    forward="""
        import os
        self.calls += 1
        if self.calls > 40:
            raise RuntimeError("no access with " + os.environ["API_KEY"])
        return self.head(self.embedding(tokens))""",
)
SLOW = "import time\ntime.sleep(300)\n" + linear()


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    home, laptop = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("laptop")
    with far_cluster(home, laptop, {"TEAM_API_KEY": SECRET}) as far:
        yield far


@dataclass(frozen=True)
class Left:
    """What is in a cluster, and in a storage."""

    actors: list[str]
    groups: list[str]
    demand: bytes | None
    files: list[str]


def _settled(far: Far, storage: Path) -> Left:
    """The same once the Scheduler is there, and actors of earlier runs and of the jobs of commands have ended."""
    far("ls")

    def is_settled() -> bool:
        left = _left(far, storage)
        return not left.groups and not any("/" in name or "job_actor" in name for name in left.actors)

    until(is_settled, SOON_S, "the end of earlier runs and jobs")
    return _left(far, storage)


def _left(far: Far, storage: Path) -> Left:
    connect(far.record.address)
    actors = [actor["Name"] for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]
    groups = [key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]
    demand = internal_kv._internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    files = [str(path) for path in storage.rglob("*")] if storage.exists() else []
    return Left(sorted(filter(None, actors)), sorted(groups), demand, sorted(files))


@pytest.fixture
def client(far: Far, monkeypatch: pytest.MonkeyPatch) -> OrchestratorClient:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, far.env[name])
    monkeypatch.chdir(far.directory)
    return OrchestratorClient(far.url)


@pytest.mark.slow
def test_the_python_api_does_it_too(far: Far, client: OrchestratorClient, texts: Path, tmp_path: Path) -> None:
    job = far.job(texts, tmp_path, "python")
    assert client.submit(job, overrides=["eval.every=5"]) == "python"
    until_stored(tmp_path / "python", lambda s: s.step > 5)
    status = client.get("python")
    assert status.phase is RunPhase.TRAINING and status.workers_now == 1
    assert client.scale("python", 2).workers == 2
    until_stored(tmp_path / "python", lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    assert "generation_planned" in [event["kind"] for event in client.events("python")]
    with pytest.raises(NotFound, match="no run 'pythn'.*Did you mean `python`"):
        client.get("pythn")
    with pytest.raises(UsageError, match="max"):
        client.scale("python", 9)
    with pytest.raises((NameTaken, UsageError), match="a run's name must be new in its storage"):
        client.submit(job)
    with pytest.raises(UsageError, match="as a file of the current directory"):
        client.submit(JobSpec(name="plain"))
    with pytest.raises(UsageError, match="`orchestrator resume … --address http"):
        client.resume("python")
    client.pause("python")
    until_stored(tmp_path / "python", lambda s: s.phase is RunPhase.PAUSED)
    assert [found.run_id for found in client.list()] == ["python"]
    assert client.audit("python").ok
    with pytest.raises(UsageError, match="run python has ended: it is paused"):
        client.stop("python")


@pytest.mark.slow
def test_run_by_url_shows_the_log_and_ends_as_the_run_does(far: Far, texts: Path, tmp_path: Path) -> None:
    done = far("run", far.job(texts, tmp_path, "short", max_steps=20))
    assert "is submitted as job short-" in done.stderr and "generation" in done.stdout
    assert until_stored(tmp_path / "short", lambda s: True).phase is RunPhase.SUCCEEDED
    assert "succeeded" in far("status", "short", "--watch").stdout
    assert far("run", "-d", far.job(texts, tmp_path, "apart"), "-o", "json").stdout == '{\n  "run_id": "apart"\n}\n'
    assert until_stored(tmp_path / "apart", lambda s: s.step > 2).phase is RunPhase.TRAINING
    assert "needs the run's files" in far("model", "generate", "apart", "--prompt", "a", expect=2).stderr
    far("stop", "apart")
    assert "stopped" in far("events", "apart", "-f").stdout  # and it comes back


@pytest.mark.slow
def test_a_secret_shows_nowhere(far: Far, texts: Path, tmp_path: Path) -> None:
    job = far.job(texts, tmp_path, "tells", source=TELLS, secrets={"API_KEY": "env:TEAM_API_KEY"})
    told = far("run", job, expect=100)
    failed = until_stored(tmp_path / "tells", lambda s: s.phase is RunPhase.FAILED)
    assert "no access with ***" in str(failed.error) and "no access with ***" in str(failed.traceback)
    (job_id,) = set(re.findall(r"submission_id='(tells-[^']+)'", far.ray("list")))
    said = [told.stdout, told.stderr, far.ray("list"), far.ray("logs", job_id)]
    said += [far(verb, "tells").stdout for verb in ("status", "events", "logs", "report")]
    assert SECRET not in "".join(said) and "***" in "".join(said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files) and len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_nothing_is_left_of_what_is_refused(far: Far, texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    before = _settled(far, storage)
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0" * 64)
    job = far.job(texts, storage, "refused")
    stranger = Far(far.directory, far.url, far.record, str(token))
    assert "refused this process" in stranger("submit", job, expect=77).stderr
    token.chmod(0o644)
    assert "may be read by others" in stranger("submit", job, expect=77).stderr
    nowhere = Far(far.directory, "http://127.0.0.1:9", far.record)
    said = nowhere("submit", job, expect=69).stderr
    assert "no cluster answers at http://127.0.0.1:9" in said and "Name the port of the cluster's Jobs API" in said
    foreign = json.loads((far.directory / job).read_text())
    foreign["model"]["entrypoint"] = "os:system"
    (far.directory / "foreign.yaml").write_text(json.dumps(foreign))
    assert "No module named 'os'" in far("submit", "foreign.yaml", expect=2).stderr
    broken = far.job(texts, storage, "broken", source="raise RuntimeError('mine')")
    assert "RuntimeError: mine" in far("submit", broken, expect=2).stderr
    large = far.job(texts, storage, "large", resources={"cpus": 50})
    assert far("submit", large, "--timeout", "3", expect=105).stderr.count("Waiting for room: 1 worker of 50 CPU") == 1
    until(lambda: _left(far, storage) == before, SOON_S, "Ray to end what looks after its jobs")
    assert not storage.exists()


def test_nothing_is_left_of_a_submission_that_is_interrupted(far: Far, texts: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    before = _settled(far, storage)
    submitting = far.popen("submit", far.job(texts, storage, "hasty", source=SLOW))
    until(lambda: any((storage / ".packages").glob("*/hasty.yaml")), SOON_S, "the driver to have what was sent")
    for _ in range(4):  # Python may lose one, in a callback of the interpreter's own; a user would try again, too
        submitting.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            submitting.communicate(timeout=30.0)
            break
    assert submitting.returncode == 130
    until(lambda: not storage.exists(), SOON_S, "what was sent to be removed again")
    until(lambda: _left(far, storage) == before, SOON_S, "Ray to end what looks after its job")
    (job,) = [job for job in far.ray("list").split("JobDetails(") if "hasty" in job]
    assert "STOPPED" in job


@pytest.mark.slow
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
    lines = far("submit", job, expect=2).stderr.splitlines()
    assert lines[0].endswith("a run's name must be new in its storage") and lines[2:] == ["Nothing was started."]
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
    error = large("submit", job, expect=2).stderr
    assert "can't be sent to the cluster" in error and "Nothing was started." in error
    assert not (tmp_path / "shared").exists() and "heavy-" not in far.ray("list")


@pytest.mark.slow
def test_a_missing_secret_ends_the_run_and_leaves_nothing(far: Far, texts: Path, tmp_path: Path) -> None:
    job = far.job(texts, tmp_path / "shared", "careless", secrets={"API_KEY": "env:NO_SUCH_KEY"})
    far("submit", job)
    ended = until_stored(tmp_path / "shared" / "careless", lambda s: s.phase is RunPhase.FAILED)
    assert "secret API_KEY is to come from the environment variable NO_SUCH_KEY" in str(ended.error)
    (listed,) = [run for run in json.loads(far("ls", "-o", "json").stdout) if run["run_id"] == "careless"]
    assert listed["phase"] == "failed" and listed["workers_now"] == 0
