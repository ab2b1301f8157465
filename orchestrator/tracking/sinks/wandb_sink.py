"""Weights & Biases sink: one offline run, `wandb sync FOLDER/wandb/offline-run-*`.

wandb writes an offline run in blocks of 32 KiB, so that a killed process loses the last one. Values are therefore kept
in a file of lines too, from which the next process writes the offline run anew.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb

from orchestrator.tracking.sinks.sink import Finish, MetricPoint, Outcome, RunInfo
from orchestrator.tracking.sinks.values_sink import ValuesSink

VALUES = "values.jsonl"  # a line per value: key, value, step, time
NOT_IN_PROJECTS = re.compile(r"[/\\#?%:]")  # W&B refuses these in a project's name, MLflow has them in experiments'
LONGEST_PROJECT = 128

Row = tuple[str, float, int, float]  # key, value, step, time


class WandbSink(ValuesSink):
    """A `Sink` that writes to one offline run, with the run's id.

    Args:
        project: its name; what W&B doesn't take in one is replaced.
    """

    def __init__(self, directory: Path, project: str) -> None:
        super().__init__()
        self._directory = directory
        self._project = NOT_IN_PROJECTS.sub("-", project)[:LONGEST_PROJECT]
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
        self.newest = {}
        self._send(self._kept())

    def write(self, points: Sequence[MetricPoint]) -> None:
        if self._run is None:  # it was ended, and goes on
            self.start(self._info)
        rows = [(point.key, point.value, point.step, point.time) for point in points]
        with (self._directory / VALUES).open("a") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        self._send(rows)  # if it fails, the next start sends what the file has

    def finish(self, end: Finish) -> None:
        if self._run is not None:
            self._run.summary["outcome"], self._run.summary["reason"] = end.outcome.value, end.reason
            self._run.finish(exit_code=1 if end.outcome is Outcome.FAILED else 0)
            wandb.teardown()  # waits for wandb's process, which writes the file after `finish` has returned
            self._run = None

    def _kept(self) -> Iterator[Row]:
        """Values in the file, each once. A last line that was cut off is removed."""
        if not (self._directory / VALUES).exists():
            return
        with (self._directory / VALUES).open("r+b") as file:
            end = 0
            for line in file:  # one after the other: a long run has many
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                key, value, step, time = json.loads(line)
                if step > self.newest.get(key, -1):
                    yield key, value, step, time

    def _send(self, rows: Iterable[Row]) -> None:
        for step, of_step in groupby(rows, key=lambda row: row[2]):
            values = {key: value for key, value, _, _ in of_step}
            self._run.log(values | {"step": step})
            self.newest |= dict.fromkeys(values, step)
