"""MLflow as a sink: one MLflow run for a run's whole life, found again by its tag after any restart.

Uses `MlflowClient` with an explicit URI only: no active run, no environment, no `./mlruns`. Importing this module
imports MLflow (2 s), and the first use of a new sqlite file makes its tables (2 s): do both where nobody waits.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Experiment, Metric, Param, Run
from mlflow.exceptions import MlflowException

from orchestrator.errors import UsageError
from orchestrator.tracking.sink import MetricPoint, Outcome, RunInfo, artifact_root

RUN_TAG = "orchestrator.run_id"
REASON_TAG = "orchestrator.reason"
EVENTS_FILE = "events.jsonl"

_METRICS_PER_CALL = 1000  # MLflow's limits for one log_batch
_PARAMS_PER_CALL = 100
_PARAM_CHARS = 6000
_UPLOAD_S = 10.0  # the events file is sent whole, so not for every event
_STATUS = {Outcome.SUCCEEDED: "FINISHED", Outcome.FAILED: "FAILED", Outcome.CANCELLED: "KILLED"}


class MlflowSink:
    """A `Sink` that writes to one run of one MLflow experiment.

    Args:
        uri: `sqlite:////absolute/path.db` (artifacts then lie beside it) or the address of an MLflow server.
        experiment: made if it doesn't exist.
        directory: holds the events until they are uploaded; should outlive this process.

    Raises:
        UsageError: the URI is neither of both.
        MlflowException: the tracker can't be reached.
    """

    def __init__(self, uri: str, experiment: str, directory: Path) -> None:
        self._uri = uri
        self._experiment = experiment
        self._events = directory / EVENTS_FILE
        self._artifact_root = artifact_root(uri)
        if self._artifact_root is not None:
            Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._run: Run | None = None
        self._events_unsent = self._events.exists()
        self._uploaded_at_s = float("-inf")  # on the monotonic clock

    def start(self, run: RunInfo) -> None:
        experiment_id = self._experiment_id()
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1
        )
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            started = found[0]
        else:
            started = self._client.create_run(experiment_id, run_name=run.name, tags={**run.tags, RUN_TAG: run.run_id})
        missing = [
            Param(name, text[:_PARAM_CHARS])
            for name, text in run.params.items()
            if text and name not in started.data.params
        ]
        for first in range(0, len(missing), _PARAMS_PER_CALL):
            self._client.log_batch(started.info.run_id, params=missing[first : first + _PARAMS_PER_CALL])
        self._run = started

    def newest_steps(self) -> Mapping[str, int]:
        run = self._client.get_run(self.tracked_id)
        return {
            name: max(point.step for point in self._client.get_metric_history(self.tracked_id, name))
            for name in run.data.metrics
        }

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """A repeat of the very same points changes nothing in MLflow, so a call that failed may be repeated."""
        metrics = [Metric(point.name, point.value, int(point.time * 1000), point.step) for point in points]
        for first in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(self.tracked_id, metrics=metrics[first : first + _METRICS_PER_CALL])

    def log_artifact(self, path: Path) -> None:
        """A file lands at the top of the run's artifacts, a directory under its own name."""
        if path.is_dir():
            self._client.log_artifacts(self.tracked_id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self.tracked_id, str(path))

    def log_event(self, event: Mapping[str, object]) -> None:
        with self._events.open("a") as file:
            file.write(json.dumps(event, sort_keys=True) + "\n")
        self._events_unsent = True

    def flush(self) -> None:
        if time.monotonic() - self._uploaded_at_s >= _UPLOAD_S:
            self._upload_events()

    def finish(self, outcome: Outcome, reason: str) -> None:
        self._upload_events()
        if reason:
            self._client.set_tag(self.tracked_id, REASON_TAG, reason)
        if outcome is Outcome.PAUSED:  # not the end: what MLflow calls waiting for its turn
            self._client.update_run(self.tracked_id, status="SCHEDULED")
        else:
            self._client.set_terminated(self.tracked_id, status=_STATUS[outcome])

    @property
    def url(self) -> str:
        """A server's page of the run; for an sqlite file its URI, which `mlflow ui --backend-store-uri` takes."""
        if self._run is None or self._artifact_root is not None:
            return self._uri
        info = self._run.info
        return f"{self._uri.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"

    @property
    def tracked_id(self) -> str:
        return str(self._run.info.run_id) if self._run else ""

    def _experiment_id(self) -> str:
        found: Experiment | None = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=self._artifact_root))
            except MlflowException:
                found = self._client.get_experiment_by_name(self._experiment)  # another run may have made it just now
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UsageError(
                f"the MLflow experiment {self._experiment!r} is deleted and takes no runs",
                remedy=f"`mlflow experiments restore -x {found.experiment_id}`, or name another tracking.experiment",
            )
        return str(found.experiment_id)

    def _upload_events(self) -> None:
        if self._events_unsent:
            self._client.log_artifact(self.tracked_id, str(self._events))
            self._uploaded_at_s = time.monotonic()
            self._events_unsent = False
