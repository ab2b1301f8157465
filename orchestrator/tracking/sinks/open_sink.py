"""Sinks by name. Each is imported by the thread that uses it: MLflow takes 2 s, for which nothing waits."""

import os
from pathlib import Path

from orchestrator.tracking.sinks.sink import Sink, TrackerSetup

MLFLOW = "mlflow"  # of every run; other names are those of `orchestrator.spec.tracking.SinkName`


def outbox_directory(name: str, setup: TrackerSetup) -> Path:
    """Folder of what waits for a sink, and of what a sink of files writes."""
    return Path(setup.directory) if name == MLFLOW else Path(setup.directory) / name


def open_sink(name: str, setup: TrackerSetup) -> Sink:
    """The sink of this name.

    Raises:
        Exception: of any kind, if the sink can't be reached or isn't installed; `explain` puts it into words.
    """
    if name == "tensorboard":
        from orchestrator.tracking.sinks.tensorboard_sink import TensorBoardSink

        return TensorBoardSink(outbox_directory(name, setup))
    if name == "wandb":
        from orchestrator.tracking.sinks.wandb_sink import WandbSink

        return WandbSink(outbox_directory(name, setup), setup.experiment)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The publisher retries. MLflow's own retries would hide an unreachable server for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from orchestrator.tracking.sinks.mlflow_sink import MlflowSink

    return MlflowSink(setup.uri, setup.experiment, setup.artifacts, outbox_directory(name, setup))


def explain(name: str, setup: TrackerSetup, error: Exception) -> str:
    """A failure of a sink in one line, with what removes it."""
    if name == MLFLOW:
        from orchestrator.tracking.sinks.mlflow_errors import explain as explain_mlflow

        return explain_mlflow(error, setup.uri)
    if isinstance(error, ModuleNotFoundError):
        return f"{error}: `pip install {error.name}` where the run's controller is; values wait until then"
    return f"{type(error).__name__}: {error}"
