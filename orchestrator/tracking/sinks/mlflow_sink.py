"""MLflow sink: one MLflow run for a run's whole life, found by its tag after a restart.

Uses `MlflowClient` with an explicit URI only: no active run, no environment, no `./mlruns`. Importing this module
imports MLflow (2 s), and the first use of a new database makes its tables (2 s): do both in the background.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import Dataset as MlflowDataset
from mlflow.entities import DatasetInput, Experiment, InputTag, Metric, Param, Run
from mlflow.exceptions import MlflowException
from sqlalchemy import NullPool, create_engine

from orchestrator.errors import UsageError
from orchestrator.tracking.sinks.mlflow_models import RunModels
from orchestrator.tracking.sinks.mlflow_note import with_outcome, without_outcome
from orchestrator.tracking.sinks.sink import (
    NOTE_TAG,
    PICTURE,
    Checkpoint,
    CheckpointMark,
    Dataset,
    Finish,
    MetricPoint,
    Outcome,
    RunInfo,
    artifact_root,
    is_directory,
    redacted,
    sqlite_path,
    with_driver,
)

RUN_TAG = "orchestrator.run_id"
REASON_TAG = "orchestrator.reason"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's pages for training, not those for agents
STALLS = {"rescales": "elastic/rescale_stall_s", "recoveries": "elastic/recovery_stall_s"}

_METRICS_PER_CALL = 1000  # MLflow's limits for one log_batch
_PARAMS_PER_CALL = 100
_PARAM_CHARS = 6000
_DIGEST_CHARS = 36
_STATUS = {Outcome.SUCCEEDED: "FINISHED", Outcome.FAILED: "FAILED", Outcome.STOPPED: "KILLED"}


def make_database(path: Path) -> None:
    """Make an SQLite file with MLflow's tables unless there is one. It appears whole: MLflow can't use one whose tables
    it was killed while making, now and later."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        made = Path(folder) / path.name
        MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
        try:
            os.link(made, path)
        except FileExistsError:  # another run's tracker was faster
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                made.rename(path)


def client_at(uri: str) -> MlflowClient:
    if is_directory(uri):  # the submission has allowed it, in another process
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return MlflowClient(tracking_uri=with_driver(uri), registry_uri=with_driver(uri))


class MlflowSink:
    """A `Sink` that writes to one run of one MLflow experiment.

    Args:
        uri: URI of an sqlite file with an absolute path, a PostgreSQL database, an MLflow server, or a directory.
        experiment: name of the experiment, created if it doesn't exist.
        artifacts: directory of a run's files if the database is PostgreSQL.
        directory: for files that MLflow doesn't have yet.

    Raises:
        UsageError: the URI has another form.
        MlflowException: the tracker can't be reached.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str, directory: Path) -> None:
        self._uri, self._directory = uri, directory
        self._experiment = experiment
        self._artifact_root = artifact_root(uri, artifacts)
        if uri.startswith("sqlite:"):
            make_database(sqlite_path(uri))
        elif self._artifact_root is not None and not is_directory(
            uri
        ):  # MLflow itself would retry for an hour before it reports an error
            engine = create_engine(with_driver(uri), poolclass=NullPool)
            engine.connect().close()
        self._client = client_at(uri)
        self._run: Run | None = None
        self._info = RunInfo("", "")

    def start(self, run: RunInfo) -> None:
        experiment_id = self._experiment_id()
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1
        )
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            started = found[0]
            note = started.data.tags.get(NOTE_TAG, "")
            if (of_active := without_outcome(note)) != note:
                self._client.set_tag(started.info.run_id, NOTE_TAG, of_active)
        else:
            started = self._client.create_run(experiment_id, run_name=run.name, tags={**run.tags, RUN_TAG: run.run_id})
        missing = [
            Param(name, text[:_PARAM_CHARS])
            for name, text in run.params.items()
            if text and name not in started.data.params
        ]
        for first in range(0, len(missing), _PARAMS_PER_CALL):
            self._client.log_batch(started.info.run_id, params=missing[first : first + _PARAMS_PER_CALL])
        self._run, self._info = started, run

    def newest_steps(self) -> Mapping[str, int]:
        return {metric.key: metric.step for metric in self._client.get_run(self.tracked_id).to_proto().data.metrics}

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Log values. MLflow drops exact repeats, so a failed call may be repeated even if it was partly done."""
        metrics = [Metric(point.key, point.value, int(point.time * 1000), point.step) for point in points]
        for first in range(0, len(metrics), _METRICS_PER_CALL):
            self._client.log_batch(self.tracked_id, metrics=metrics[first : first + _METRICS_PER_CALL])

    def log_artifact(self, path: Path) -> None:
        """Log a file at the top of the run's artifacts, or a directory under its own name."""
        if path.is_dir():
            self._client.log_artifacts(self.tracked_id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self.tracked_id, str(path))

    def log_table(self, path: Path) -> None:
        """Replace the table; MLflow's own `log_table` would append on a repeat. The tag makes MLflow's UI show it."""
        self._client.log_artifact(self.tracked_id, str(path))
        self._client.set_tag(
            self.tracked_id, "mlflow.loggedArtifacts", json.dumps([{"path": path.name, "type": "table"}])
        )

    def log_inputs(self, datasets: Sequence[Dataset]) -> None:
        inputs = [
            DatasetInput(
                MlflowDataset(
                    name=dataset.name,
                    digest=dataset.digest[:_DIGEST_CHARS],
                    source_type="local",
                    source=json.dumps({"uri": dataset.source}),
                    profile=json.dumps(
                        {
                            "digest": dataset.digest,
                            "num_documents": dataset.num_documents,
                            "num_tokens": dataset.num_tokens,
                        }
                    ),
                ),
                [InputTag("mlflow.data.context", dataset.context)],
            )
            for dataset in datasets
        ]
        self._client.log_inputs(self.tracked_id, inputs)

    def log_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._models().log(checkpoint)

    def mark_checkpoints(self, mark: CheckpointMark) -> None:
        self._models().mark(mark)

    def finish(self, end: Finish) -> None:
        if end.reason:
            self._client.set_tag(self.tracked_id, REASON_TAG, end.reason)
        self._describe(end)
        if end.outcome is Outcome.PAUSED:  # not terminated: SCHEDULED is MLflow's status for a waiting run
            self._client.update_run(self.tracked_id, status="SCHEDULED")
        else:
            self._client.set_terminated(self.tracked_id, status=_STATUS[end.outcome])
        if end.outcome is Outcome.SUCCEEDED and self._info.register_as is not None:  # may take long
            self._models().register(self._info.register_as, self._info.alias, self._info.export, self._directory)

    @property
    def url(self) -> str:
        """The run's page on a server; for a database its URI, which `orchestrator tracking ui --uri` accepts."""
        if self._run is None or self._artifact_root is not None:
            return redacted(self._uri)
        info = self._run.info
        return f"{redacted(self._uri).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"

    @property
    def tracked_id(self) -> str:
        return str(self._run.info.run_id) if self._run else ""

    def _describe(self, end: Finish) -> None:
        """Write the end into the run's description. Users may have changed the rest of it, which stays."""
        run = self._client.get_run(self.tracked_id)
        newest = {
            found.key: MetricPoint(found.key, found.value, found.step, found.timestamp / 1000)
            for found in run.to_proto().data.metrics
            if found.key in ("train/loss", "eval/loss")
        }
        moves = {kind: len(self._client.get_metric_history(self.tracked_id, key)) for kind, key in STALLS.items()}
        picture = None
        if any(file.path == PICTURE for file in self._client.list_artifacts(self.tracked_id)):
            picture = f"get-artifact?path={PICTURE}&run_uuid={self.tracked_id}"
        note = with_outcome(run.data.tags.get(NOTE_TAG, ""), end, newest, moves, picture)
        self._client.set_tag(self.tracked_id, NOTE_TAG, note)

    def _models(self) -> RunModels:
        assert self._run is not None, "start was not called"
        return RunModels(self._client, self._run, self._info.run_id)

    def _experiment_id(self) -> str:
        found: Experiment | None = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment, self._artifact_root, tags=KIND))
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
