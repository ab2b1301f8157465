"""What a submission adds to a run's tracking."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UsageError
from orchestrator.run_records.tracker_setup import tracker_setup
from orchestrator.spec.job import JobSpec
from orchestrator.submission.provenance import with_provenance


def _job(**tracking: Any) -> JobSpec:
    return JobSpec.model_validate({"schema": "v1", "name": "try", "tracking": tracking})


def test_mlflow_s_variables_fill_in_what_the_job_leaves_out() -> None:
    variables = {"MLFLOW_TRACKING_URI": "http://tracker:5000", "MLFLOW_EXPERIMENT_NAME": "ours"}
    given = with_provenance(_job(uri="sqlite:////a.db", experiment="orchestrator"), None, variables).tracking
    assert (given.uri, given.experiment) == ("sqlite:////a.db", "orchestrator")
    filled = with_provenance(_job(), None, variables).tracking
    assert (filled.uri, filled.experiment) == ("http://tracker:5000", "ours")
    alone = with_provenance(_job(), None, {}).tracking
    assert (alone.uri, alone.experiment) == (None, "orchestrator")
    assert with_provenance(_job(), None, {"MLFLOW_TRACKING_URI": "databricks://me"}).tracking.uri == "databricks://me"


@pytest.mark.parametrize("uri", ["./mlruns", "sqlite:///relative.db"])
def test_a_variable_that_can_not_be_used_is_named(uri: str) -> None:
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI is set: .* is neither"):
        with_provenance(_job(), None, {"MLFLOW_TRACKING_URI": uri})
    assert with_provenance(_job(uri="sqlite:////a.db"), None, {"MLFLOW_TRACKING_URI": uri}).tracking.uri is not None


def test_a_directory_of_mlflow_s_files_needs_mlflow_s_own_way_out() -> None:
    uri = "file:///runs/mlruns"
    for job, variables, key in (
        (_job(uri=uri), {}, "tracking.uri"),
        (_job(), {"MLFLOW_TRACKING_URI": uri}, "MLFLOW_TR"),
    ):
        with pytest.raises(UsageError, match=f"^{key}.* is {uri}, and MLflow no longer maintains") as refused:
            with_provenance(job, None, variables | {"MLFLOW_ALLOW_FILE_STORE": "false"})
        assert "mlflow migrate-filestore" in refused.value.remedy
        assert "MLFLOW_ALLOW_FILE_STORE=true" in refused.value.remedy
        assert with_provenance(job, None, variables | {"MLFLOW_ALLOW_FILE_STORE": "True"}).tracking.uri == uri


def test_a_password_in_the_variable_is_refused_and_hidden() -> None:
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        with_provenance(_job(), None, {"MLFLOW_TRACKING_URI": "http://me:swordfish@tracker:5000"})
    assert "swordfish" not in str(refused.value)


def test_user_file_and_commit_of_a_submission_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    outside = with_provenance(_job(), tmp_path / "job.yaml", {}).tracking.tags
    assert "mlflow.source.git.commit" not in outside
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    wanted = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    spec = with_provenance(_job(tags={"team": "moe", "mlflow.user": "babbage"}), tmp_path / "job.yaml", {})
    assert spec.tracking.tags == {
        "mlflow.source.type": "JOB",
        "mlflow.user": "babbage",
        "mlflow.source.name": str(tmp_path / "job.yaml"),
        "mlflow.source.git.commit": wanted,
        "team": "moe",
    }
    assert outside["mlflow.user"] == "ada"
    tags = tracker_setup("try", Path("/runs/try"), spec).run.tags
    assert tags["team"] == "moe" and tags["orchestrator.run_dir"] == "/runs/try"
    assert tags["mlflow.note.content"].splitlines() == [
        "- **Task:** `lm`",
        "- **Model:** 4 layers of width 128, 8 experts, 2 per token",
        "- **Data:** `builtin:stdlib`",
        "- **Training:** 1,000 steps of 16 rows, fp32",
        "- **Workers:** 1",
        "- **Run storage:** `/runs/try`",
    ]
    mine = _job(tags={"mlflow.note.content": "mine"})
    assert tracker_setup("try", Path("/runs/try"), mine).run.tags["mlflow.note.content"] == "mine"
