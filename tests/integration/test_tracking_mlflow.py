"""The tracker against real MLflow stores: an sqlite file, a server that goes away, a PostgreSQL of our own."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import NotFound, TermSuperseded, UsageError
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.run import Resumed
from orchestrator.protocol.events.training import CheckpointCommitted, CheckpointsDeleted
from orchestrator.tracking.mlflow_server import MlflowServer
from orchestrator.tracking.outbox_file import FILE
from orchestrator.tracking.sinks.sink import Dataset, MetricPoint, RunInfo, TrackerPosition, TrackerSetup, with_driver
from orchestrator.tracking.tracker import Tracker
from tests.support.hosts import until
from tests.support.ports import free_port
from tests.support.sink_files import of_tensorboard, of_wandb

pytestmark = pytest.mark.timeout(300)

PATIENCE_S = 90.0
PARAMS = {"name": "demo", "train.lr": "0.001", "notes": "x" * 7000}
DATASETS = [Dataset(f"texts/{split}", split, "ab" * 32, "/texts", 3, 400) for split in ("train", "validation")]


def setup_of(directory: Path, uri: str = "", run_id: str = "demo-1", sinks: tuple[str, ...] = ()) -> TrackerSetup:
    run = RunInfo(run_id, "demo", params=PARAMS, register_as="demo-moe", alias="newest")
    uri = uri or f"sqlite:///{directory}/store/mlflow.db"
    return TrackerSetup(uri, "tests", run, str(directory / run_id), str(directory / "artifacts"), sinks)


def reborn(tracker: Tracker, setup: TrackerSetup) -> Tracker:
    """Another tracker over the same outbox, as after the end of the process."""
    close(tracker)
    return Tracker(setup)


def close(tracker: Tracker) -> None:
    for outlet in tracker._outlets:
        outlet.outbox.close()


def points(name: str, steps: range, value: float) -> list[MetricPoint]:
    return [MetricPoint(name, value + step, step, time.time()) for step in steps]


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient  # imported after the tracker has switched MLflow's telemetry off

    return MlflowClient(with_driver(uri), with_driver(uri))


def only_run(client: Any) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    return run


def models_of(client: Any) -> dict[int, Any]:
    found = client.search_logged_models([client.get_experiment_by_name("tests").experiment_id])
    return {int(model.tags["orchestrator.step"]): model for model in found}


def error_of(tracker: Tracker) -> str:
    """The tracker's error, once it reports one."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (error := tracker.describe()["error"]):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return error


def whole_life(directory: Path, uri: str, sinks: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """A run that fails, goes on in another process and succeeds. Returns MLflow's client and run."""
    (directory / "job.yaml").write_text("name: demo\n")
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}")
    setup = setup_of(directory, uri, sinks=sinks)
    first = Tracker(setup)
    first.publish(1, points("train/loss", range(1200), 5.0), after=-1, loads={0: ((5, 1),), 600: ((3, 3),)})
    first.publish(1, [MetricPoint("train/grad_norm", float("inf"), 0, time.time())])
    first.publish(1, [MetricPoint("system/cpu_percent", 50.0, 3, time.time(), label="10.0.0.7")])
    first.publish(1, [MetricPoint("elastic/rescale_stall_s", 0.5, step, time.time()) for step in (40, 80)])
    first.artifact(1, str(directory / "job.yaml"))
    first.artifact(1, str(directory / "tokenizer"))
    first.inputs(1, DATASETS)
    first.inputs(1, DATASETS)
    for seq, step in enumerate((599, 1099, 1199)):
        first.event(1, JournalEntry(seq, 1, time.time(), CheckpointCommitted(step, f"/c/{step}", 0, "")))
    first.event(1, JournalEntry(3, 1, time.time(), CheckpointsDeleted((599,))))
    assert first.finish(1, "failed", reason="peer_lost: worker 3", timeout_s=PATIENCE_S), first.describe()
    client = client_of(uri)
    run = only_run(client)
    assert (run.info.status, run.data.tags["orchestrator.reason"]) == ("FAILED", "peer_lost: worker 3")
    assert "failed after 1,200 steps" in run.data.tags["mlflow.note.content"]
    client.set_tag(run.info.run_id, "mlflow.note.content", f"mine\n\n{run.data.tags['mlflow.note.content']}")

    second = reborn(first, setup)
    assert second.position().step == 1199
    second.event(2, JournalEntry(4, 2, time.time(), Resumed("t", 1099, None, 2)))
    second.publish(2, points("train/loss", range(1100, 1500), 9.0), after=1099)
    second.event(2, JournalEntry(5, 2, time.time(), CheckpointCommitted(1499, "/c/1499", 0, "")))
    assert second.finish(2, "succeeded", timeout_s=PATIENCE_S), second.describe()
    assert second.describe()["mlflow_run_id"] == run.info.run_id
    with pytest.raises(TermSuperseded, match="term 1 may not publish: term 2 does"):
        second.publish(1, points("train/loss", range(1500, 1501), 0.0))
    return client, only_run(client)


def check_whole_life(client: Any, run: Any, artifacts: Path, listed: int = 1500) -> None:
    assert (run.info.run_name, run.info.status, run.data.params["train.lr"]) == ("demo", "FINISHED", "0.001")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    values = {point.step: point.value for point in history}
    assert len(history) == listed
    assert values == {step: (5.0 if step < 1200 else 9.0) + step for step in range(1500)}
    assert run.data.metrics["system/cpu_percent/10.0.0.7"] == 50.0

    contexts = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert contexts.keys() == {"train", "validation"} and len(run.inputs.dataset_inputs) == 2
    assert json.loads(contexts["train"].source) == {"uri": "/texts"}
    assert json.loads(contexts["validation"].profile)["digest"] == "ab" * 32

    models = models_of(client)
    fates = {step: model.tags["orchestrator.checkpoint"] for step, model in models.items()}
    assert fates == {599: "deleted", 1099: "stored", 1199: "superseded", 1499: "stored"}
    newest = models[1499]
    assert (newest.model_type, newest.status.name, newest.tags["orchestrator.path"]) == (
        "checkpoint",
        "READY",
        "/c/1499",
    )
    assert [(m.key, m.value, m.step) for m in newest.metrics] == [("train/loss", 9.0 + 1499, 1499)]
    assert {output.step for output in run.outputs.model_outputs} == set(models)
    version = client.get_model_version_by_alias("demo-moe", "newest")
    assert (version.run_id, version.source) == (run.info.run_id, newest.artifact_location)
    assert version.tags["orchestrator.path"] == "/c/1499"

    note, kind = run.data.tags["mlflow.note.content"], "mlflow.experimentKind"
    assert note.startswith("mine\n\n**Outcome:** succeeded after 1,500 steps, train loss 1508.0000, rescales 2, recov")
    assert "failed" not in note and f"(get-artifact?path=story.png&run_uuid={run.info.run_id})" in note
    assert client.get_experiment(run.info.experiment_id).tags[kind] == "custom_model_development"

    (folder,) = artifacts.rglob(f"{run.info.run_id}/artifacts")
    assert (folder / "job.yaml").read_text() == "name: demo\n"
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    table = json.loads((folder / "events.json").read_text())
    assert [row[2] for row in table["data"]].count("checkpoint") == 4
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "events.json", "type": "table"}]
    assert (folder / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "story.png").stat().st_size > 10_000 and "<svg" in (folder / "story.html").read_text()


def test_sinks_side_by_side_have_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    client, run = whole_life(tmp_path, f"sqlite:///{tmp_path}/store/mlflow.db", ("tensorboard", "wandb"))
    check_whole_life(client, run, tmp_path / "store" / "mlflow-artifacts")
    loss = [(step, (5.0 if step < 1200 else 9.0) + step) for step in range(1500)]
    curves, summary, exit_code = of_wandb(tmp_path / "demo-1" / "wandb")
    for found in (curves, of_tensorboard(tmp_path / "demo-1" / "tensorboard")):
        assert found["train/loss"] == loss and found["system/cpu_percent/10.0.0.7"] == [(3, 50.0)]
        assert found["train/grad_norm"] == [(0, float("inf"))]
    assert (summary["outcome"], exit_code) == ("succeeded", 0)
    assert list(elsewhere.iterdir()) == []  # nothing depends on the current directory


def test_a_sink_that_is_away_holds_up_no_other_and_gets_everything_later(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, sinks=("tensorboard",))
    (tmp_path / "demo-1" / "tensorboard").mkdir(parents=True)
    broken = tmp_path / "demo-1" / "tensorboard" / "events.out.tfevents.0"
    broken.mkdir()  # a folder can't be read as a file
    tracker = Tracker(setup)
    tracker.publish(1, points("train/loss", range(3), 5.0), after=-1)
    assert not tracker.finish(1, "succeeded", timeout_s=1.0)
    until(lambda: tracker.describe()["waiting"] == 4, PATIENCE_S, "MLflow to have everything")
    client = client_of(setup.uri)
    assert only_run(client).info.status == "FINISHED"
    assert error_of(tracker).startswith("tensorboard: ")
    broken.rmdir()
    assert tracker.finish(1, "succeeded", timeout_s=PATIENCE_S), tracker.describe()
    loss = of_tensorboard(tmp_path / "demo-1" / "tensorboard")["train/loss"]
    assert loss == [(step, 5.0 + step) for step in range(3)]


def test_a_directory_of_mlflow_s_files_holds_the_whole_life_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")  # as in a tracker's process; the submission has allowed it
    client, run = whole_life(tmp_path, f"file://{tmp_path}/store/mlruns")
    repeats = len(models_of(client))  # a model's value is that of the run again, and files keep both
    check_whole_life(client, run, tmp_path / "store" / "mlflow-artifacts", 1500 + repeats)


def test_a_process_that_is_killed_while_it_makes_the_database_leaves_none(tmp_path: Path) -> None:
    """MLflow finds half of its tables there otherwise, and can make the others never."""
    path = tmp_path / "mlflow.db"
    make = "import sys; from pathlib import Path as P; "
    make += "from orchestrator.tracking.sinks.mlflow_sink import make_database as m"
    make += "; m(P(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", make, str(path)])
    deadline_s = time.monotonic() + PATIENCE_S
    while not any(part.stat().st_size > 0 for part in tmp_path.glob(".mlflow-*/mlflow.db")):
        assert time.monotonic() < deadline_s and process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait(PATIENCE_S)
    assert not path.exists()
    tracker = Tracker(setup_of(tmp_path, f"sqlite:///{path}"))
    tracker.publish(1, points("train/loss", range(3), 1.0), after=-1)
    assert tracker.finish(1, "stopped", "", PATIENCE_S)
    assert only_run(client_of(f"sqlite:///{path}")).data.metrics["train/loss"] == 3.0


def test_a_broken_mlflow_store_delays_no_run_and_loses_nothing(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, run_id="demo-2")
    broken = Tracker(setup)
    assert broken.finish(1, "succeeded", timeout_s=PATIENCE_S)  # the store is there, the run is in it
    store = sqlite3.connect(tmp_path / "store" / "mlflow.db", isolation_level=None)
    store.execute("ALTER TABLE metrics RENAME TO metrics_away")
    began_s = time.monotonic()
    broken.publish(1, points("train/loss", range(600), 5.0), after=-1)
    assert time.monotonic() - began_s < 0.5
    assert not broken.finish(1, "stopped", timeout_s=1.0)
    assert "no such table" in error_of(broken)
    assert broken.describe()["waiting"] == 601

    again = reborn(broken, setup)  # its process was killed
    assert (again.describe()["waiting"], again.position().step) == (600, 599)
    store.execute("ALTER TABLE metrics_away RENAME TO metrics")
    store.close()
    assert again.finish(1, "stopped", timeout_s=PATIENCE_S)
    client = client_of(setup.uri)
    run = only_run(client)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 600


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_has_every_value_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/server.db"
    server = MlflowServer(uri, log=tmp_path / "server.log")
    tracker = Tracker(setup_of(tmp_path, server.url))
    assert tracker.finish(1, "paused", timeout_s=PATIENCE_S), tracker.describe()
    server.kill()
    for step in range(0, 3000, 50):
        tracker.publish(1, points("train/loss", range(step, step + 50), 5.0), after=step - 1)
    assert not tracker.finish(1, "succeeded", timeout_s=1.0)
    assert error_of(tracker) == f"no MLflow server answers at {server.url}: start it, or correct tracking.uri"
    with MlflowServer(uri, port=server.port, log=tmp_path / "server.log"):
        assert tracker.finish(1, "succeeded", timeout_s=PATIENCE_S), tracker.describe()
        (picture,) = re.findall(r"!\[.*\]\((.*)\)", only_run(client_of(server.url)).data.tags["mlflow.note.content"])
        with urllib.request.urlopen(f"{server.url}/{picture}", timeout=PATIENCE_S) as answer:
            assert answer.headers["Content-Type"] == "image/png" and answer.read().startswith(b"\x89PNG")
    rows = sqlite3.connect(tmp_path / "server.db").execute("SELECT step FROM metrics WHERE key = 'train/loss'")
    assert sorted(step for (step,) in rows) == list(range(3000))


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """The address of a server of another kind."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        pytest.param(401, "You are not authenticated.", "doesn't know us: give the tracker credentials", id="login"),
        pytest.param(403, "Permission denied", "doesn't allow us this: Permission denied", id="permission"),
        pytest.param(404, "<html>nothing here</html>", "is no MLflow server: correct tracking.uri", id="another"),
        pytest.param(200, "<html>welcome</html>", "is no MLflow server: correct tracking.uri", id="welcome"),
    ],
)
def test_an_unusable_tracking_server_is_reported(tmp_path: Path, status: int, body: str, message: str) -> None:
    with answering(status, body) as address:
        tracker = Tracker(setup_of(tmp_path, address))
        tracker.publish(1, points("train/loss", range(3), 1.0))
        assert message in error_of(tracker)
        assert tracker.describe()["waiting"] == 3


def test_a_database_with_an_older_schema_is_a_warning(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    tracker = Tracker(setup)
    assert tracker.finish(1, "paused", timeout_s=PATIENCE_S)
    close(tracker)
    store = sqlite3.connect(tmp_path / "store" / "mlflow.db")
    store.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    store.commit()
    store.close()
    done = subprocess.run(  # in a process of its own: MLflow looks at a database once
        [sys.executable, "-c", TOLD, setup.uri, str(tmp_path / "other")], capture_output=True, text=True, check=True
    )
    assert "has MLflow's schema 451aebb31d03, this version needs" in done.stdout
    assert f"`mlflow db upgrade {setup.uri}`" in done.stdout


TOLD = """
import sys, time
from orchestrator.tracking.sinks.sink import RunInfo, TrackerSetup, with_driver
from orchestrator.tracking.tracker import Tracker
tracker = Tracker(TrackerSetup(sys.argv[1], "tests", RunInfo("r", "r"), sys.argv[2], sys.argv[2]))
while not tracker.describe()["error"]:
    time.sleep(0.05)
print(tracker.describe()["error"])
"""


def test_a_damaged_outbox_is_set_aside(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    directory = Path(setup.directory)
    directory.mkdir()
    (directory / FILE).write_text("no database, but long enough to be looked at as one" * 40)
    tracker = Tracker(setup)
    assert tracker.position() == TrackerPosition()  # the controller publishes everything anew
    assert (directory / f"{FILE}.damaged").exists()


@pytest.mark.parametrize("uri", ["sqlite:///relative.db", "ftp://host"])
def test_what_can_never_work_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UsageError, match="ABSOLUTE"):
        Tracker(setup_of(tmp_path, uri))
    tracker = Tracker(setup_of(tmp_path))
    with pytest.raises(NotFound, match="nowhere"):
        tracker.artifact(2, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="done"):
        tracker.finish(2, "done")


# -- PostgreSQL ------------------------------------------------------------------------------------------------------


class Postgres:
    """A server on loopback in a directory of its own; Debian's, which refuses to run as root."""

    def __init__(self, bin_dir: Path, directory: Path) -> None:
        self._bin, self._data = bin_dir, directory / "pg"
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._data.mkdir()
        if self._as:
            shutil.chown(self._data, "postgres")
            for parent in (directory, *directory.parents[:-1]):
                if parent.stat().st_uid == 0 and parent != Path("/tmp"):
                    parent.chmod(parent.stat().st_mode | 0o011)
        password = self._data.parent / "password"
        password.write_text("right")
        self._run("initdb", "-D", str(self._data / "db"), "-U", "orc", "--auth=scram-sha-256", f"--pwfile={password}")
        self.port = free_port()
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        log = str(self._data / "log")
        self._run("pg_ctl", "-D", str(self._data / "db"), "-l", log, "-w", "-o", options, "start")

    def uri(self, password: str) -> str:
        return f"postgresql://orc:{password}@127.0.0.1:{self.port}/postgres"

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._data / "db"), "-m", "immediate", "stop")

    def _run(self, name: str, *args: str) -> None:
        command = [*self._as, str(self._bin / name), *args]
        done = subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("Debian's postgresql is not installed")
    server = Postgres(found[-1].parent, tmp_path)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.slow
def test_postgresql_holds_the_whole_life_of_a_run(tmp_path: Path, postgres: Postgres) -> None:
    import psycopg2

    client, run = whole_life(tmp_path, postgres.uri("right"))
    check_whole_life(client, run, tmp_path / "artifacts")
    with psycopg2.connect(postgres.uri("right")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*), count(DISTINCT (key, step)) FROM metrics")
        assert cursor.fetchone() == (1504, 1504)

    refused = Tracker(setup_of(tmp_path, postgres.uri("wrong"), "refused"))
    error = error_of(refused)
    assert "password authentication failed" in error and "PGPASSWORD" in error and "wrong" not in error
