"""Interface of trackers for metrics, events and artifacts of a run. Imports no tracker."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from orchestrator.errors import UsageError
from orchestrator.metrics.registry import metric

NOTE_TAG = "mlflow.note.content"  # MLflow's own name of a run's description
PICTURE = "story.png"  # chart of the run's whole course, an artifact


@dataclass(frozen=True)
class TrackerPosition:
    """What a tracker has of a run without gaps.

    Args:
        step: the newest step up to which values of every step were published; -1 before any.
        event: `seq` of the newest event; -1 before any.
    """

    step: int = -1
    event: int = -1


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric at one step. `time` is `time.time()` seconds; `label` is set for metrics that have one:
    the node, or the name of a task's metric.

    Raises:
        NotFound: the name is not declared in `orchestrator.metrics.registry`.
    """

    name: str
    value: float
    step: int
    time: float
    label: str = ""

    def __post_init__(self) -> None:
        metric(self.name)

    @property
    def key(self) -> str:
        """The metric's name in the tracker: `train/loss`, `system/cpu_percent/10.0.0.7`."""
        return f"{self.name}/{self.label}" if self.label else self.name


@dataclass(frozen=True)
class Dataset:
    """One split of a corpus. `digest` is that of its source text, `source` the location of that text."""

    name: str
    context: str  # train or validation
    digest: str
    source: str
    num_documents: int
    num_tokens: int


class Fate(StrEnum):
    """State of a checkpoint's files."""

    STORED = "stored"
    DELETED = "deleted"  # by retention
    SUPERSEDED = "superseded"  # the run went on from an earlier one


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `seq` is that of its event: after a rollback a step may have a second checkpoint.

    `points` are the newest values, up to its step, of metrics that describe a model.
    """

    seq: int
    step: int
    path: str
    points: tuple[MetricPoint, ...] = ()


@dataclass(frozen=True)
class CheckpointMark:
    """A new `Fate` of the checkpoints of `steps` and of all after the step `after`."""

    fate: Fate
    steps: tuple[int, ...] = ()
    after: int | None = None


@dataclass(frozen=True)
class Artifact:
    path: str


@dataclass(frozen=True)
class Inputs:
    datasets: tuple[Dataset, ...]


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    PAUSED = "paused"


@dataclass(frozen=True)
class Finish:
    """The end of the run, after all other items."""

    outcome: Outcome
    reason: str


Item = MetricPoint | Artifact | Inputs | Checkpoint | CheckpointMark | Finish


@dataclass(frozen=True)
class ModelExport:
    """Writer of a checkpoint's model as other libraries load it: `function`, "module:name", gets `run_dir`, the name of
    a checkpoint, and the path of a new directory. It raises UsageError for a model that no other library knows."""

    function: str
    run_dir: str


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, passed to a sink once. `params` never change; `run_id` identifies the run after a restart.

    When the run succeeds, the model of its newest checkpoint, written by `export`, is registered as `register_as`,
    under `alias`.
    """

    run_id: str
    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    register_as: str | None = None
    alias: str | None = None
    export: ModelExport | None = None


@dataclass(frozen=True)
class TrackerSetup:
    """Arguments of a tracker's process.

    `directory` holds the outbox and must outlive the process; it is made below `root`, which must be there, unless that
    is empty. `artifacts` is for files that no server stores. `sinks` names those beside MLflow: each has an outbox of
    its own in a folder of `directory`, by its name.
    """

    uri: str
    experiment: str
    run: RunInfo
    directory: str
    artifacts: str
    sinks: tuple[str, ...] = ()
    root: str = ""


class Sink(Protocol):
    """Receiver of a run's metrics and artifacts. Every method may block or raise, and may then be called again."""

    def start(self, run: RunInfo) -> None:
        """Find the run, or create it."""

    def newest_steps(self) -> Mapping[str, int]:
        """The newest step with a value, by the metric's key."""

    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Store values. Repeating identical ones changes nothing."""

    def log_artifact(self, path: Path) -> None:
        """Store a copy of a file or of a directory."""

    def log_table(self, path: Path) -> None:
        """Store a file of `columns` and `data` as a table."""

    def log_inputs(self, datasets: Sequence[Dataset]) -> None: ...

    def log_checkpoint(self, checkpoint: Checkpoint) -> None: ...

    def mark_checkpoints(self, mark: CheckpointMark) -> None: ...

    def finish(self, end: Finish) -> None:
        """Mark the run as ended, with the reason."""

    @property
    def url(self) -> str:
        """Address of the run's page; empty before `start`."""

    @property
    def tracked_id(self) -> str:
        """The run's id in the tracker; empty before `start`."""


def check_uri(uri: str) -> None:
    """Raises UsageError unless the URI has a supported form, which works from any directory."""
    if not re.fullmatch(r"sqlite:////.+|postgresql(\+psycopg2)?://.+|https?://.+|databricks(://.+)?|file:///.+", uri):
        raise UsageError(
            f"tracking URI {redacted(uri)!r} is neither sqlite:////ABSOLUTE/PATH.db, nor postgresql://HOST/DATABASE, "
            "nor the http(s):// address of an MLflow server, nor databricks, nor file:///ABSOLUTE/DIRECTORY",
            remedy="Set tracking.uri in the job file to one of them, or leave it out",
        )


def artifact_root(uri: str, artifacts: str) -> str | None:
    """Root of artifacts for the tracker at `uri`: beside an sqlite file or a directory of MLflow's, in `artifacts` for
    another database, None if a server decides. Raises UsageError as `check_uri` does."""
    check_uri(uri)
    if uri.startswith(("http", "databricks")):
        return None
    if uri.startswith("sqlite:"):
        return (sqlite_path(uri).parent / "mlflow-artifacts").as_uri()
    if is_directory(uri):
        return f"{uri.rstrip('/').rpartition('/')[0]}/mlflow-artifacts"
    return Path(artifacts).as_uri()


def is_directory(uri: str) -> bool:
    """Whether the URI is of MLflow's files in a directory, which MLflow opens only with `MLFLOW_ALLOW_FILE_STORE`."""
    return uri.startswith("file:")


def sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def with_driver(uri: str) -> str:
    """The URI with an explicit PostgreSQL driver: SQLAlchemy's default differs between versions."""
    return "postgresql+psycopg2" + uri.removeprefix("postgresql") if uri.startswith("postgresql://") else uri


def redacted(uri: str) -> str:
    """The URI without its password, for display."""
    return re.sub(r"(://[^:/@]*):[^/]*@", r"\1:***@", uri)


def flattened(value: object, path: str = "") -> dict[str, str]:
    """A JSON value as dotted names and texts: {"train": {"lr": 0.1}} becomes {"train.lr": "0.1"}. Lists stay JSON."""
    if isinstance(value, Mapping):
        items = ((f"{path}.{key}" if path else str(key), inner) for key, inner in value.items())
        return {name: text for key, inner in items for name, text in flattened(inner, key).items()}
    return {path: value if isinstance(value, str) else json.dumps(value)}
