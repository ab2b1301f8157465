"""The pure parts of tracking's face."""

import pytest

from orchestrator.errors import NotFound, UsageError
from orchestrator.tracking.sinks.sink import MetricPoint, artifact_root, flattened, redacted


def test_a_point_of_an_undeclared_metric_can_not_be_made() -> None:
    assert MetricPoint("train/loss", 1.0, step=0, time=0.0).name == "train/loss"
    with pytest.raises(NotFound, match="train/loss"):
        MetricPoint("train/los", 1.0, step=0, time=0.0)


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("sqlite:////runs/mlflow.db", "file:///runs/mlflow-artifacts"),
        ("sqlite:////my runs/x.db?timeout=30", "file:///my%20runs/mlflow-artifacts"),
        ("file:///my%20runs/mlruns/", "file:///my%20runs/mlflow-artifacts"),
        ("postgresql://host/mlflow", "file:///runs/kept"),
        ("http://127.0.0.1:5000", None),
        ("https://mlflow.example.org/base", None),
    ],
)
def test_artifacts_are_beside_the_file_or_where_the_server_keeps_them(uri: str, root: str | None) -> None:
    assert artifact_root(uri, "/runs/kept") == root


@pytest.mark.parametrize("uri", ["", "sqlite:///mlflow.db", "sqlite://", "./mlruns", "file:mlruns", "ftp://host"])
def test_a_uri_that_would_depend_on_the_current_directory_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="sqlite:////ABSOLUTE"):
        artifact_root(uri, "/runs/kept")


def test_flattened_params_are_dotted_texts() -> None:
    job = {"name": "demo", "train": {"lr": 3e-4, "exact": True}, "eval": None, "schedule": [{"at_step": 5}], "envs": {}}
    assert flattened(job) == {
        "name": "demo",
        "train.lr": "0.0003",
        "train.exact": "true",
        "eval": "null",
        "schedule": '[{"at_step": 5}]',
    }


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:se:cr%2Fet@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("https://me:secret@host/base", "https://me:***@host/base"),
        ("http://127.0.0.1:5000/a@b", "http://127.0.0.1:5000/a@b"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_a_password_is_not_shown(uri: str, shown: str) -> None:
    assert redacted(uri) == shown
