"""What Grafana and Prometheus read is that of the code as it is, and every alert has been tried."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards import queries
from dashboards.alerts import ALERTS
from dashboards.build import DIRECTORY, FILES
from orchestrator.errors import NotFound
from orchestrator.metrics.registry import DECLARED

PROMTOOL = shutil.which("promtool")
with_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool isn't installed (Debian: prometheus)")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_as_new_as_the_code(name: str) -> None:
    assert (DIRECTORY / name).read_text(encoding="utf-8") == FILES[name](), "run `python -m dashboards.build`"


def test_the_folder_holds_no_other_files() -> None:
    assert {path.name for path in DIRECTORY.glob("*.json")} == {name for name in FILES if name.endswith(".json")}


def test_there_is_a_dashboard_for_each_matter() -> None:
    boards = {name.removesuffix(".json"): json.loads(build()) for name, build in FILES.items() if ".json" in name}
    assert set(boards) == {"fleet", "run", "experts", "elasticity", "communication"}
    for board in boards.values():
        titles = [panel["title"] for panel in board["panels"]]
        assert titles and len(titles) == len(set(titles))
        assert all(panel["description"] and panel["targets"] for panel in board["panels"])


def test_every_metric_is_looked_at() -> None:
    text = "".join(build() for build in FILES.values())
    assert [metric.name for metric in DECLARED if queries.series(metric.name) not in text] == []


def test_a_misspelt_metric_is_an_error() -> None:
    for ask in (queries.series, queries.newest, queries.rate):
        with pytest.raises(NotFound, match="Did you mean `train/loss`"):
            ask("train/los")


def test_only_what_adds_up_has_a_rate_and_only_counters_a_rise() -> None:
    with pytest.raises(ValueError, match="train/loss is a gauge"):
        queries.rate("train/loss")
    with pytest.raises(ValueError, match="comm/sent_bytes is a amount"):
        queries.rise("comm/sent_bytes", "5m")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, is_quiet = cases(yaml.safe_load((DIRECTORY / "alerts_test.yml").read_text(encoding="utf-8")))
    names = {alert.name for alert in ALERTS}
    assert fires == is_quiet == names


def cases(file: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Names of the alerts that some case wants to fire, and of those that some case wants not to."""
    wanted = [case for test in file["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in wanted if case["exp_alerts"]}
    return fires, {case["alertname"] for case in wanted if not case["exp_alerts"]}


@with_promtool
def test_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@with_promtool
def test_a_rule_that_is_wrong_is_found(tmp_path: Path) -> None:
    """The cases can fail: with each alert's bound moved out of reach they do."""
    for alert in ALERTS:
        rules = FILES["alerts.yml"]().replace(alert.expr, f"({alert.figure}) > 1e12")
        (tmp_path / "alerts.yml").write_text(rules, encoding="utf-8")
        shutil.copy(DIRECTORY / "alerts_test.yml", tmp_path)
        done = promtool("test", "rules", "alerts_test.yml", folder=tmp_path)
        assert done.returncode != 0 and alert.name in done.stdout + done.stderr


def promtool(*args: str, folder: Path = DIRECTORY) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(PROMTOOL), *args], cwd=folder, capture_output=True, text=True, timeout=200)
