"""Summaries of a run, at its end or at any moment. Pure functions."""

import shlex
import shutil
import sys
from pathlib import Path

from orchestrator.cli.terminal.format import (
    NONE,
    duration,
    moment,
    number,
    rate,
    recovery,
    rescale,
    resources,
    traffic,
    workers,
)
from orchestrator.protocol.status import RunStatus


def summary(status: RunStatus) -> list[tuple[str, str]]:
    """A run as (heading, value) pairs; an empty heading continues the one before."""
    lines = [
        ("run", f"{status.run_id}: {status.phase}, {status.step} of {status.steps} steps{_took(status)}"),
        ("train loss", _from_to(status.first_loss, status.loss)),
        ("validation loss", _from_to(status.first_validation_loss, status.validation_loss)),
        *((f"validation {name}", f"{value:.4f}") for name, value in status.validation_metrics.items()),
        ("speed", rate(status.tokens_per_second, status.unit)),
    ]
    changes = [rescale(change) for change in status.rescales] or ["none"]
    lines += list(zip(["rescales", *[""] * (len(changes) - 1)], changes, strict=True))
    if status.recoveries:
        recoveries = [recovery(change) for change in status.recoveries]
        lines += list(zip(["recoveries", *[""] * (len(recoveries) - 1)], recoveries, strict=True))
    lines.append(("checkpoint", status.checkpoint or NONE))
    if status.tracking_url:
        lines.append(("mlflow", tracking_command(status.tracking_url)))
    if status.warning:
        lines.append(("warning", status.warning))
    if status.error:
        lines.append(("error", status.error))
    return lines


def details(status: RunStatus, now_s: float) -> list[tuple[str, str]]:
    """The summary of a run, and its current state; while it is active also how long ago its controller reported it."""
    as_of = [] if status.as_of_time is None or status.phase.ended else [("as of", _ago(now_s - status.as_of_time))]
    return [
        *summary(status),
        ("state", status.why or NONE),
        *as_of,
        ("priority", str(status.priority)),
        ("workers", workers(status) if status.workers_now else NONE),
        ("each worker", resources(status.resources)),
        *_expert_load(status),
        ("traffic", traffic(status.traffic)),
        ("held", _held(status)),
        ("run storage", status.storage.replace("_", " ")),
        ("generation", str(status.generation) if status.generation >= 0 else NONE),
        ("submitted", moment(status.submitted_time)),
        ("started", moment(status.started_time)),
        ("ended", moment(status.ended_time)),
        ("directory", status.run_dir),
    ]


def aligned(lines: list[tuple[str, str]]) -> str:
    width = max(len(heading) for heading, _ in lines)
    return "\n".join(f"{heading:<{width}}  {value}" for heading, value in lines)


def tracking_command(url: str) -> str:
    """URL of the run's metrics on a server, or the command that shows a database in MLflow's own UI."""
    if url.startswith(("http://", "https://")):
        return url
    return f"{shlex.quote(_mlflow())} ui --backend-store-uri {shlex.quote(url)}"


def _from_to(first: float | None, last: float | None) -> str:
    return NONE if last is None else f"{number(first)} -> {number(last)}"


def _ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def _held(status: RunStatus) -> str:
    held = {0: NONE, 1: "once: a lost worker sends the run back to a checkpoint", 3: "in three workers' memory"}
    waiting = f"; finished, not committed: {status.uncommitted}" * (status.uncommitted > 0)
    return held.get(status.held_by, "twice: in two workers' memory") + waiting


def _expert_load(status: RunStatus) -> list[tuple[str, str]]:
    """How unevenly the experts' tokens are spread over workers; nothing where there is one, or are no experts."""
    if status.rank_violation is None:
        return []
    return [("expert load", f"the busiest worker has {1 + status.rank_violation:.2f} times the mean")]


def _took(status: RunStatus) -> str:
    if status.started_time is None or status.ended_time is None:
        return ""
    return f" in {duration(status.ended_time - status.started_time)}"


def _mlflow() -> str:
    """MLflow's command as typed here: that of our own environment may not be on the PATH."""
    beside = Path(sys.executable).parent / "mlflow"
    if shutil.which("mlflow") or not beside.exists():
        return "mlflow"
    below = beside.is_relative_to(Path.cwd())
    return str(beside.relative_to(Path.cwd()) if below else beside)
