"""Deletion of a run in MLflow. Importing this module imports MLflow (2 s)."""

from pathlib import Path

from mlflow.exceptions import MlflowException

from orchestrator.errors import OrchestratorError
from orchestrator.tracking.sinks.mlflow_sink import RUN_TAG, client_at
from orchestrator.tracking.sinks.sink import TrackerSetup, redacted, sqlite_path


def delete_run(setup: TrackerSetup) -> str | None:
    """Delete the run in its experiment. Returns its id there; None if MLflow has no such run.

    Raises:
        OrchestratorError: MLflow does not answer.
    """
    if setup.uri.startswith("sqlite:") and not Path(sqlite_path(setup.uri)).exists():
        return None
    try:
        client = client_at(setup.uri)
        experiment = client.get_experiment_by_name(setup.experiment)
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{setup.run.run_id}'", max_results=1
        )
        if not found:
            return None
        client.delete_run(found[0].info.run_id)
    except MlflowException as error:
        raise OrchestratorError(
            f"MLflow at {redacted(setup.uri)} can't delete run {setup.run.run_id}: {error.message}",
            remedy="Try again once it answers, or leave --tracking out.",
            unchanged="Nothing was removed.",
        ) from error
    return str(found[0].info.run_id)
