"""Sinks of files: each value is written once, after repeated calls and after kills too."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.tracking.sinks.open_sink import explain, open_sink
from orchestrator.tracking.sinks.sink import Finish, MetricPoint, Outcome, RunInfo, Sink, TrackerSetup
from tests.support.sink_files import Curve, of_tensorboard, of_wandb

NAMES = ("tensorboard", "wandb")
RUN = RunInfo("r1", "r1", params={"train.lr": "0.1"})
END = Finish(Outcome.FAILED, "no workers")


def setup_of(directory: Path) -> TrackerSetup:
    return TrackerSetup("", "demo", RUN, str(directory), str(directory), NAMES)


def opened(name: str, directory: Path) -> Sink:
    sink = open_sink(name, setup_of(directory))
    sink.start(RUN)
    return sink


def curves_of(name: str, directory: Path) -> dict[str, Curve]:
    return of_tensorboard(directory / name) if name == "tensorboard" else of_wandb(directory / name)[0]


def points(key: str, steps: range) -> list[MetricPoint]:
    return [MetricPoint(key, 2.5 - step / 8, step, 10.0 + step) for step in steps]


def curve(steps: range) -> Curve:
    return [(step, 2.5 - step / 8) for step in steps]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.tracking.sinks.test_values_sinks import opened, points
sink = opened(sys.argv[1], Path(sys.argv[2]))
sink.log_metrics(points("train/loss", range(8)) + points("eval/loss", range(3, 4)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_lost_or_repeated_by_a_kill(name: str, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, name, str(tmp_path)], env={**os.environ, "PYTHONPATH": "."})
    assert killed.returncode == -signal.SIGKILL
    sink = opened(name, tmp_path)
    assert {key: sink.newest_steps()[key] for key in ("train/loss", "eval/loss")} == {"train/loss": 7, "eval/loss": 3}
    for _ in range(2):  # the first was sent by the killed process too
        sink.log_metrics(points("train/loss", range(12)) + points("eval/loss", range(3, 4)))
    sink.finish(END)
    assert curves_of(name, tmp_path) == {"train/loss": curve(range(12)), "eval/loss": curve(range(3, 4))}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_ended_is_resumed(name: str, tmp_path: Path) -> None:
    sink = opened(name, tmp_path)
    sink.log_metrics(points("train/loss", range(2)))
    sink.finish(Finish(Outcome.PAUSED, ""))
    sink.log_metrics(points("train/loss", range(2, 4)))
    sink.finish(Finish(Outcome.SUCCEEDED, ""))
    assert curves_of(name, tmp_path) == {"train/loss": curve(range(4))}


def test_values_of_two_metrics_need_not_come_in_one_order_of_steps(tmp_path: Path) -> None:
    sink = opened("wandb", tmp_path)
    sink.log_metrics([MetricPoint("train/loss", 2.0, 9, 1.0), MetricPoint("system/cpu_percent", 5.0, 7, 2.0, "n1")])
    sink.finish(END)
    curves, summary, exit_code = of_wandb(tmp_path / "wandb")
    assert curves == {"train/loss": [(9, 2.0)], "system/cpu_percent/n1": [(7, 5.0)]}
    assert (summary["outcome"], summary["reason"], exit_code) == ("failed", "no workers", 1)
    assert sink.tracked_id == "r1"


def test_the_last_line_of_a_full_disk_is_written_again(tmp_path: Path) -> None:
    sink = opened("wandb", tmp_path)
    sink.log_metrics(points("train/loss", range(2)))
    sink.finish(END)
    with (tmp_path / "wandb" / "values.jsonl").open("a") as file:
        file.write('["train/lo')
    again = opened("wandb", tmp_path)
    assert again.newest_steps() == {"train/loss": 1}
    again.log_metrics(points("train/loss", range(4)))
    again.finish(END)
    assert curves_of("wandb", tmp_path) == {"train/loss": curve(range(4))}


def test_what_is_not_installed_is_named() -> None:
    why = explain("wandb", setup_of(Path("/r")), ModuleNotFoundError("No module named 'wandb'", name="wandb"))
    assert why == ("No module named 'wandb': `pip install wandb` where the run's controller is; values wait until then")
    assert explain("tensorboard", setup_of(Path("/r")), OSError("no space")) == "OSError: no space"


def test_an_experiment_that_w_and_b_cannot_name_gets_another_name(tmp_path: Path) -> None:
    setup = replace(setup_of(tmp_path), experiment="/Users/me@here/50%: " + 200 * "a")
    sink = open_sink("wandb", setup)
    sink.start(RUN)
    sink.log_metrics(points("train/loss", range(2)))
    sink.finish(END)
    assert of_wandb(tmp_path / "wandb")[0]["train/loss"] == curve(range(2))


def test_values_that_w_and_b_could_not_be_given_are_given_once(tmp_path: Path) -> None:
    sink = opened("wandb", tmp_path)
    real, sink._run = sink._run, None  # type: ignore[attr-defined]
    sink._run = SimpleNamespace(log=_refuses)  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(ConnectionError):
            sink.log_metrics(points("train/loss", range(3)))
    sink._run = real  # type: ignore[attr-defined]
    sink.finish(END)
    again = opened("wandb", tmp_path)
    again.finish(END)
    assert of_wandb(tmp_path / "wandb")[0]["train/loss"] == curve(range(3))


def _refuses(_: object) -> None:
    raise ConnectionError("wandb's process has ended")
