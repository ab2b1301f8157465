"""A run in run storage as Ray Train's `Result`.

Metrics are those of committed steps, under the names of docs/metrics.md, and `step`, counted from 0.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from ray.train import Checkpoint
from ray.train.v2.api.config import CheckpointConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result

from orchestrator.policy.state.progress import Progress
from orchestrator.protocol.events.base import JournalEntry
from orchestrator.protocol.events.generations import Recovered, Rescaled
from orchestrator.protocol.step_record import StepRecord
from orchestrator.run_records.checkpoints.search import path_of
from orchestrator.run_records.run_files import RunFiles
from orchestrator.run_records.run_history import read_entries
from orchestrator.telemetry.step_metrics import points_of_event, points_of_steps
from orchestrator.tracking.sinks.sink import MetricPoint

Row = dict[str, Any]
VALIDATION = "eval/loss"
OF_TASK = "eval/metric/"  # begins metrics of a task


def result_of(
    run_dir: Path, config: CheckpointConfig | None = None, error: TrainingFailedError | None = None
) -> Result:
    """The run's result so far.

    `metrics` are those of the newest committed step, with the newest validation. `metrics_dataframe` has a row per
    committed step. `best_checkpoints` are all that are kept, last the best one by the config's score, else the newest.

    Args:
        error: with which the run has ended.

    Raises:
        NotFound: the directory holds no run.
    """
    files = RunFiles(run_dir)
    rows = rows_of(Progress(), files.steps(), read_entries(files.run_dir, only=(Rescaled, Recovered)))
    rated = with_validations(rows)
    checkpoints = [
        (Checkpoint.from_directory(str(path_of(run_dir, kept))), rated.get(kept.step, {}))
        for kept in files.checkpoints()
    ]
    return Result(
        metrics=next(reversed(rated.values()), None),
        checkpoint=checkpoints[-1][0] if checkpoints else None,
        error=error,
        path=str(run_dir),
        metrics_dataframe=pd.DataFrame(rows) if rows else None,
        best_checkpoints=_ranked(checkpoints, config or CheckpointConfig()),
    )


def rows_of(before: Progress, steps: Sequence[StepRecord], entries: Sequence[JournalEntry] = ()) -> list[Row]:
    """Metrics of these steps, which follow `before`, with those of the events that belong to one of them."""
    rows = {record.step: Row(step=record.step) for record in steps}
    points: list[MetricPoint] = points_of_steps(before, list(steps))
    for entry in entries:
        points += points_of_event(entry)
    for point in points:
        if point.step in rows:
            rows[point.step][point.key] = point.value
    return list(rows.values())


def with_validations(rows: Sequence[Row]) -> dict[int, Row]:
    """The rows by step, each with the newest validation up to it, by which checkpoints are kept."""
    known: Row = {}
    found = {}
    for row in rows:
        if VALIDATION in row:
            known = {name: value for name, value in row.items() if name == VALIDATION or name.startswith(OF_TASK)}
        found[row["step"]] = row | known
    return found


def _ranked(checkpoints: Sequence[tuple[Checkpoint, Row]], config: CheckpointConfig) -> list[tuple[Checkpoint, Row]]:
    """Checkpoints, worst first; one without the score is worse than any."""
    metric, sign = config.checkpoint_score_attribute, 1 if config.checkpoint_score_order == "max" else -1
    if metric is None:
        return list(checkpoints)
    return sorted(checkpoints, key=lambda one: sign * one[1][metric] if metric in one[1] else float("-inf"))
