from pathlib import Path

import pytest

from orchestrator.cli.terminal import summary
from orchestrator.protocol.status import RunPhase
from tests.unit.cli.statuses import MEASURED, UNMEASURED, status


def test_the_end_of_a_run() -> None:
    over = status(
        phase=RunPhase.SUCCEEDED,
        step=180,
        rescales=(MEASURED, UNMEASURED),
        checkpoint="/runs/try/checkpoints/step-00000179",
        ended_time=1130.0,
    )
    lines = summary.summary(over)
    told = dict(lines)
    assert told["run"] == "try: succeeded, 180 of 180 steps in 2 min 0 s"
    assert told["train loss"] == "7.648 -> 5.312"
    assert told["validation loss"] == "7.570 -> 5.400"
    assert told["checkpoint"] == "/runs/try/checkpoints/step-00000179"
    assert [heading for heading, _ in lines].count("rescales") == 1
    assert lines[5] == ("", summary.rescale(UNMEASURED))


def test_what_is_not_known_is_a_dash() -> None:
    lines = dict(summary.details(status(loss=None, validation_loss=None, tokens_per_second=None, workers_now=0), 0.0))
    assert {lines[key] for key in ("train loss", "validation loss", "speed", "workers", "ended")} == {"-"}
    assert lines["rescales"] == "none"


def test_an_active_run_shows_how_old_its_status_is() -> None:
    assert ("as of", "0.8 s ago") in summary.details(status(as_of_time=1000.0), now_s=1000.8)
    assert ("as of", "0.0 s ago") in summary.details(status(as_of_time=1000.0), now_s=999.9)  # another machine's clock
    over = status(phase=RunPhase.STOPPED, as_of_time=1000.0)
    assert "as of" not in dict(summary.details(over, 1000.8)) | dict(summary.details(status(), 1000.8))


def test_a_failure_shows_its_cause() -> None:
    assert ("error", "rank 1 died") in summary.summary(status(phase=RunPhase.FAILED, error="rank 1 died"))


def test_uneven_workers_are_shown_where_experts_have_tokens() -> None:
    assert ("expert load", "the busiest worker has 1.62 times the mean") in summary.details(
        status(rank_violation=0.62), 0.0
    )
    assert "expert load" not in dict(summary.details(status(), 0.0))


def test_a_warning_is_shown() -> None:
    assert ("warning", "metrics can't be published") in summary.summary(status(warning="metrics can't be published"))


def test_metrics_are_opened_by_a_command_or_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert summary.tracking_command("http://host/#/runs/1") == "http://host/#/runs/1"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mlflow").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert summary.tracking_command("sqlite:////a b.db") == (
        ".venv/bin/mlflow ui --backend-store-uri 'sqlite:////a b.db'"
    )


def test_values_are_aligned() -> None:
    assert summary.aligned([("run", "a"), ("", "b"), ("speed", "c")]) == "run    a\n       b\nspeed  c"


@pytest.mark.parametrize(
    ("held_by", "uncommitted", "shown"),
    [
        (0, 0, "-"),
        (1, 41, "once: a lost worker sends the run back to a checkpoint; finished, not committed: 41"),
        (2, 0, "twice: in two workers' memory"),
        (3, 0, "in three workers' memory"),
        (2, 1, "twice: in two workers' memory; finished, not committed: 1"),
    ],
)
def test_holders_of_the_newest_step_and_steps_that_are_not_committed(
    held_by: int, uncommitted: int, shown: str
) -> None:
    assert dict(summary.details(status(held_by=held_by, uncommitted=uncommitted), 0.0))["held"] == shown
