"""Where metrics, events and artifacts of a run go: the face that the rest of the package sees. Imports no tracker."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from orchestrator.errors import UsageError
from orchestrator.metrics import metric


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric at one step. `time` is `time.time()` seconds.

    Raises:
        NotFound: the name is not declared in `orchestrator.metrics`.
    """

    name: str
    value: float
    step: int
    time: float

    def __post_init__(self) -> None:
        metric(self.name)


@dataclass(frozen=True)
class RunInfo:
    """What a sink is told of a run, once. `params` are set for good; `run_id` finds the run again after a restart."""

    run_id: str
    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


class Outcome(StrEnum):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"


class Sink(Protocol):
    """Takes what a run publishes. Every method may block and may raise, and may then be called again."""

    def start(self, run: RunInfo) -> None:
        """Find the run, or make it."""

    def newest_steps(self) -> Mapping[str, int]:
        """The newest step that each metric has a value for."""

    def log_metrics(self, points: Sequence[MetricPoint]) -> None: ...

    def log_artifact(self, path: Path) -> None:
        """Keep a copy of a file or of a directory."""

    def log_event(self, event: Mapping[str, object]) -> None:
        """Keep one JSON-able event, after those before it."""

    def flush(self) -> None:
        """Send what is kept back, if it is due. Called every few seconds."""

    def finish(self, outcome: Outcome, reason: str) -> None:
        """Send what is kept back and mark the run as ended, with the reason if it failed."""

    @property
    def url(self) -> str:
        """Where a person looks at the run; empty before `start`."""

    @property
    def tracked_id(self) -> str:
        """The run's id in the tracker; empty before `start`."""


def artifact_root(uri: str) -> str | None:
    """Where the artifacts of the tracker at `uri` lie: beside an sqlite file; None where a server decides.

    Raises:
        UsageError: the URI is neither an sqlite file by its absolute path, nor the address of a server.
    """
    scheme, _, rest = uri.partition("://")
    if scheme in ("http", "https"):
        return None
    if scheme == "sqlite" and rest.startswith("//"):
        return (Path(rest[1:].partition("?")[0]).parent / "mlflow-artifacts").as_uri()
    raise UsageError(
        f"tracking URI {uri!r} is neither sqlite:////ABSOLUTE/PATH.db nor the http(s):// address of an MLflow server",
        remedy="Set tracking.uri in the job file to one of them, or leave it out",
    )


def flattened(value: object, path: str = "") -> dict[str, str]:
    """A JSON value as dotted names and texts: {"train": {"lr": 0.1}} is {"train.lr": "0.1"}. Lists stay JSON."""
    if isinstance(value, Mapping):
        items = ((f"{path}.{key}" if path else str(key), inner) for key, inner in value.items())
        return {name: text for key, inner in items for name, text in flattened(inner, key).items()}
    return {path: value if isinstance(value, str) else json.dumps(value)}
