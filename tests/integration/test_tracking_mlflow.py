"""The tracker against a real MLflow store in an sqlite file."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import EpochSuperseded, NotFound, UsageError
from orchestrator.tracking.sink import MetricPoint
from orchestrator.tracking.tracker import Tracker

JOB = {"name": "demo", "train": {"lr": 0.001, "steps": 1500}, "notes": "x" * 7000}


def tracker(directory: Path, run_id: str = "demo-1") -> Tracker:
    uri = f"sqlite:///{directory}/store/mlflow.db"
    return Tracker(uri, "tests", run_id, "demo", json.dumps(JOB), str(directory / run_id))


def points(name: str, steps: range, value: float) -> list[MetricPoint]:
    return [MetricPoint(name, value + step, step, time.time()) for step in steps]


def client_of(tracked: Tracker) -> Any:
    from mlflow import MlflowClient  # imported after the tracker has switched MLflow's telemetry off

    return MlflowClient(tracked.describe()["uri"])


def runs_of(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("tests").experiment_id]))


def test_one_mlflow_run_for_the_whole_life_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "job.yaml").write_text("name: demo\n")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")

    first = tracker(tmp_path)
    first.publish(1, points("train/loss", range(1200), 5.0))
    first.publish(1, [MetricPoint("train/grad_norm", float("inf"), 0, time.time())])
    first.artifact(1, str(tmp_path / "job.yaml"))
    first.artifact(1, str(tmp_path / "tokenizer"))
    first.event(1, {"event": "activated", "stall_s": 0.25})
    assert first.finish(1, "failed", reason="peer_lost: worker 3", timeout_s=90.0)
    described = first.describe()
    assert (described["published"], described["queued"], described["error"]) == (1201, 0, "")
    client = client_of(first)
    (run,) = runs_of(client)
    assert (run.info.status, run.data.tags["orchestrator.reason"]) == ("FAILED", "peer_lost: worker 3")

    # The run goes on in another process, from an earlier step: the same MLflow run, and no step has two values.
    second = tracker(tmp_path)
    second.publish(2, points("train/loss", range(1100, 1500), 9.0))
    second.event(2, {"event": "ended"})
    assert second.finish(2, "succeeded", timeout_s=90.0)
    (run,) = runs_of(client)
    assert run.info.run_id == described["mlflow_run_id"] == second.describe()["mlflow_run_id"]
    assert (run.info.run_name, run.info.status, run.data.params["train.lr"]) == ("demo", "FINISHED", "0.001")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    values = {point.step: point.value for point in history}
    assert len(history) == 1500
    assert values == {step: (5.0 if step < 1200 else 9.0) + step for step in range(1500)}

    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(tmp_path / "store" / "mlflow-artifacts")
    assert (artifacts / "job.yaml").read_text() == "name: demo\n"
    assert (artifacts / "tokenizer" / "tokenizer.json").exists()
    events = [json.loads(line)["event"] for line in (artifacts / "events.jsonl").read_text().splitlines()]
    assert events == ["activated", "ended"]
    assert list(elsewhere.iterdir()) == []  # nothing depends on the current directory

    with pytest.raises(EpochSuperseded, match="epoch 1 may not publish: epoch 2 does"):
        second.publish(1, points("train/loss", range(1500, 1501), 0.0))
    with pytest.raises(EpochSuperseded):
        second.finish(1, "cancelled")
    with pytest.raises(NotFound, match="nowhere"):
        second.artifact(2, str(tmp_path / "nowhere"))
    with pytest.raises(TypeError):
        second.event(2, {"not": object()})
    with pytest.raises(ValueError, match="done"):
        second.finish(2, "done")


def test_a_broken_store_delays_nobody_and_loses_nothing(tmp_path: Path) -> None:
    broken = tracker(tmp_path, "demo-2")
    assert broken.finish(1, "succeeded", timeout_s=90.0)  # the store is there, the run is in it
    store = sqlite3.connect(tmp_path / "store" / "mlflow.db", isolation_level=None)
    store.execute("ALTER TABLE metrics RENAME TO metrics_away")
    began_s = time.monotonic()
    broken.publish(1, points("train/loss", range(600), 5.0))
    assert time.monotonic() - began_s < 0.5
    assert not broken.finish(1, "cancelled", timeout_s=1.0)
    assert "no such table" in broken.describe()["error"]
    assert broken.describe()["queued"] == 601
    store.execute("ALTER TABLE metrics_away RENAME TO metrics")
    store.close()
    assert broken.finish(1, "cancelled", timeout_s=90.0)
    assert (broken.describe()["published"], broken.describe()["queued"]) == (600, 0)
    client = client_of(broken)
    (run,) = runs_of(client)
    assert run.info.status == "KILLED"
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 600


@pytest.mark.parametrize(
    ("uri", "params", "rule"),
    [
        pytest.param("sqlite:///relative.db", "{}", "ABSOLUTE", id="relative"),
        pytest.param("sqlite:////tmp/x.db", "[]", "JSON object", id="params"),
    ],
)
def test_what_can_never_work_is_refused_at_once(tmp_path: Path, uri: str, params: str, rule: str) -> None:
    with pytest.raises(UsageError, match=rule):
        Tracker(uri, "tests", "r", "r", params, str(tmp_path))
