"""The tracker of one run: a plain class for a process of its own, which the run's controller calls by name.

    tracker = Tracker(uri="sqlite:////runs/mlflow.db", experiment="demo", run_id="r1", run_name="r1",
                      params_json=job.model_dump_json(), directory="/runs/r1/tracking")
    tracker.publish(epoch, [MetricPoint("train/loss", 2.5, step=7, time=time.time())])
    tracker.finish(epoch, "succeeded")

Training never waits for it, and it never raises because MLflow fails.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from orchestrator.errors import EpochSuperseded, NotFound, UsageError
from orchestrator.tracking.publisher import Artifact, Event, Finish, Publisher
from orchestrator.tracking.sink import MetricPoint, Outcome, RunInfo, Sink, artifact_root, flattened


class TrackerState(TypedDict):
    """What `Tracker.describe` answers. `url` and `mlflow_run_id` are empty until MLflow has answered once."""

    uri: str
    url: str
    mlflow_run_id: str
    epoch: int  # the highest seen
    queued: int
    published: int  # metric values in MLflow, sent by this process
    dropped: int  # values given up because the queue was full
    error: str  # the newest failure; empty once MLflow takes things again


class Tracker:
    """Publishes one run to MLflow. Thread-safe; every method but `finish` returns at once.

    Args:
        uri: `sqlite:////ABSOLUTE/PATH.db` or the http(s) address of an MLflow server.
        experiment: name of the MLflow experiment.
        run_id: finds the MLflow run again when this process is started anew.
        run_name: what people see.
        params_json: the job file as JSON; its flattened fields become the MLflow run's parameters.
        directory: for events that wait for their upload.

    Raises:
        UsageError: the URI is of no known form, or `params_json` is no JSON object.
    """

    def __init__(self, uri: str, experiment: str, run_id: str, run_name: str, params_json: str, directory: str) -> None:
        artifact_root(uri)
        params = json.loads(params_json)
        if not isinstance(params, dict):
            raise UsageError(f"params_json is a {type(params).__name__}; it must be a JSON object")

        def connect() -> Sink:
            # MLflow is imported by the publishing thread: it takes 2 s, and who makes a tracker doesn't wait for it.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # The publisher repeats what failed. MLflow's own repeats would hide for minutes that nobody answers.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            from orchestrator.tracking.mlflow_sink import MlflowSink

            return MlflowSink(uri, experiment, Path(directory))

        self._uri = uri
        self._epoch = -1
        self._epoch_lock = threading.Lock()
        self._publisher = Publisher(connect, RunInfo(run_id, run_name, params=flattened(params)))

    def publish(self, epoch: int, points: Sequence[MetricPoint]) -> None:
        """Queue values. Of each metric, steps not newer than the newest published one are dropped as repeats.

        Raises:
            EpochSuperseded: a controller with a higher epoch has published here. The same holds for all below.
        """
        self._admit(epoch)
        self._publisher.put(points)

    def event(self, epoch: int, fields: Mapping[str, object]) -> None:
        """Queue one JSON-able event for the run's `events.jsonl`. Raises TypeError if it is not JSON-able."""
        self._admit(epoch)
        json.dumps(fields)
        self._publisher.put([Event(fields)])

    def artifact(self, epoch: int, path: str) -> None:
        """Queue a copy of a file or directory. Raises NotFound if there is none."""
        self._admit(epoch)
        if not Path(path).exists():
            raise NotFound(f"artifact {path} does not exist", unchanged="Nothing was published.")
        self._publisher.put([Artifact(Path(path))])

    def finish(self, epoch: int, outcome: str, reason: str = "", timeout_s: float = 30.0) -> bool:
        """Send everything, then mark the run as ended. Waits; a tracker that fails is given up after `timeout_s`.

        Args:
            outcome: an `Outcome`: succeeded, failed, cancelled.

        Returns:
            whether everything has arrived; if not, `describe` says why, and it is still being tried.
        """
        self._admit(epoch)
        end = Finish(Outcome(outcome), reason)
        self._publisher.put([end])
        return end.delivered.wait(timeout_s)

    def describe(self) -> TrackerState:
        state = self._publisher.state()
        return TrackerState(
            uri=self._uri,
            url=state.url,
            mlflow_run_id=state.tracked_id,
            epoch=self._epoch,
            queued=state.queued,
            published=state.published,
            dropped=state.dropped,
            error=state.error,
        )

    def _admit(self, epoch: int) -> None:
        with self._epoch_lock:
            if epoch < self._epoch:
                raise EpochSuperseded(
                    f"epoch {epoch} may not publish: epoch {self._epoch} does", unchanged="Nothing was published."
                )
            self._epoch = epoch
