"""Weights & Biases sink: one offline run, `wandb sync FOLDER/wandb/offline-run-*`.

wandb writes an offline run in blocks of 32 KiB, so that a killed process loses the last one. Values are therefore kept
in a file of lines too, from which the next process writes the offline run anew.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb

from orchestrator.tracking.sinks.sink import Finish, MetricPoint, Outcome, RunInfo
from orchestrator.tracking.sinks.values_sink import ValuesSink

VALUES = "values.jsonl"  # a line per value: key, value, step, time


class WandbSink(ValuesSink):
    """A `Sink` that writes to one offline run of the project `project`, with the run's id."""

    def __init__(self, directory: Path, project: str) -> None:
        super().__init__()
        self._directory, self._project = directory, project
        self._info = RunInfo("", "")
        self._run: Any = None

    @property
    def url(self) -> str:
        return str(self._directory / "wandb")

    @property
    def tracked_id(self) -> str:
        return self._info.run_id

    def start(self, run: RunInfo) -> None:
        """Begin the offline run, with the values of an earlier process."""
        self._info = run
        logging.getLogger("wandb").setLevel(logging.WARNING)
        shutil.rmtree(self._directory / "wandb", ignore_errors=True)
        (self._directory / "wandb").mkdir(parents=True)
        settings = wandb.Settings(
            mode="offline",
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        self._run = wandb.init(
            project=self._project,
            id=run.run_id,
            name=run.name,
            config=dict(run.params),
            dir=str(self._directory),
            settings=settings,
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric="step")  # values of a metric come in order; not those of two
        points = self._kept()
        self._send(points)
        self.newest = {key: step for key, _, step, _ in points}

    def write(self, points: Sequence[MetricPoint]) -> None:
        if self._run is None:  # it was ended, and goes on
            self.start(self._info)
        rows = [(point.key, point.value, point.step, point.time) for point in points]
        with (self._directory / VALUES).open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        self._send(rows)

    def finish(self, end: Finish) -> None:
        if self._run is not None:
            self._run.summary["outcome"], self._run.summary["reason"] = end.outcome.value, end.reason
            self._run.finish(exit_code=1 if end.outcome is Outcome.FAILED else 0)
            wandb.teardown()  # waits for wandb's process, which writes the file after `finish` has returned
            self._run = None

    def _kept(self) -> list[tuple[str, float, int, float]]:
        """Values in the file. A last line that was cut off is removed."""
        file = self._directory / VALUES
        if not file.exists():
            return []
        whole, newline, cut_off = file.read_text().rpartition("\n")
        if cut_off:
            file.write_text(whole + newline)
        return [tuple(json.loads(line)) for line in whole.splitlines()]

    def _send(self, rows: Sequence[tuple[str, float, int, float]]) -> None:
        for step, values in groupby(rows, key=lambda row: row[2]):
            self._run.log({key: value for key, value, _, _ in values} | {"step": step})
