"""The command `report`: what it prints and writes, and what it refuses. No cluster."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.report.tables import tables, warnings
from orchestrator.policy.report.report import report_of
from orchestrator.protocol.events.workers import EnergyRead
from orchestrator.protocol.usage import EnergyReading
from orchestrator.spec.job import JobSpec
from orchestrator.storage.directory import DirectoryObjects
from orchestrator.storage.journal import Journal
from tests.unit.cli.test_main import Done, here, orchestrator
from tests.unit.policy.stories import Story, eventful, write

__all__ = ["here", "orchestrator"]  # fixtures

JOB = JobSpec.model_validate({"schema": "v1", "name": "try", "resources": {"gpus": 1}})
Command = Callable[..., Done]


@pytest.fixture
def runs(here: Path) -> Iterator[Path]:
    """Run storage with `books`, which has ended, and `poems`, which goes on."""
    write(eventful(), here / "runs" / "books", JOB)
    story = Story()
    story.start(2)
    story.train(30)
    write(story, here / "runs" / "poems", JOB)
    return here / "runs"


def test_text_has_every_account(runs: Path, orchestrator: Command) -> None:
    done = orchestrator("report", "books", "--cost-per-worker-hour", "3", "--watts-per-worker", "250")
    assert done.returncode == 0 and done.stderr == ""
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert lines["goodput"].endswith("82.9%") and lines["attempts"].endswith("2: paused, succeeded")
    assert "140.00 s   64.5%" in lines["compute"] and "40.00 s   18.4%" in lines["exposed communication"]
    assert lines["these differ by"].split()[-1] == "0.05%" and lines["GPU-hours, held"].endswith(" h")
    assert lines["energy, a model"].endswith("kWh") and "energy, RAPL" not in lines
    assert "Energy, a model: not measured: 250 W per worker x worker-hours held." in done.stdout
    assert float(lines["per million tokens"].split()[-1]) == pytest.approx(23.6, abs=1.0)
    assert "recovery" in lines and "rescale" in lines and "3 -> 2" in lines["recovery"]


def test_a_measured_run_beside_an_unmeasured_one(runs: Path, orchestrator: Command) -> None:
    story = Story()
    story.start(2)
    story.train(30)
    story.tell(EnergyRead({"w0": EnergyReading(cpu_j=3.6e6), "w1": EnergyReading(cpu_j=1.8e6)}))
    story.end("succeeded")
    write(story, runs / "metered", JOB)
    done = orchestrator("report", "metered", "books")
    (energy,) = [line for line in done.stdout.splitlines() if line.startswith("energy")]
    assert energy.split("  ")[0] == "energy, RAPL" and "1.5 kWh" in energy and energy.endswith("not measured")
    assert "Energy, RAPL: measured: processors" in done.stdout and "of 2 of 2 workers" in done.stdout
    assert "Energy: not measured: no worker could read" in done.stdout
    assert "energy, RAPL" in orchestrator("report", "metered").stdout


def test_json_is_the_report_and_of_two_runs_a_list(runs: Path, orchestrator: Command) -> None:
    told = json.loads(orchestrator("report", "books", "-o", "json").stdout)
    assert told["run_id"] == "books" and told["cost"]["total"] is None
    assert told["energy"] == [] and told["energy_note"].startswith("not measured")
    parts = {part["use"]: part["seconds"] for part in told["time"]}
    assert sum(parts.values()) == pytest.approx(told["elapsed_s"])
    assert told["flops"]["parameters"] == pytest.approx(6 * told["flops"]["active_parameters"] * told["tokens"])
    both = json.loads(orchestrator("report", "books", "poems", "-o", "json").stdout)
    assert [one["run_id"] for one in both] == ["books", "poems"] and both[0] == told


def test_the_report_of_an_ended_and_an_active_run_side_by_side(runs: Path, orchestrator: Command) -> None:
    done = orchestrator("report", "books", "poems", "--storage", "runs")
    assert done.returncode == 0 and "poems has not ended according to its journal" in done.stderr
    (head,) = [line for line in done.stdout.splitlines() if line.startswith("RUN ")]
    assert head.split() == ["RUN", "books", "poems"]
    (steps,) = [line for line in done.stdout.splitlines() if line.startswith("steps ")]
    assert steps.split() == ["steps", "200", "30"]
    assert "no price given" in done.stdout and "TRANSITIONS OF books" in done.stdout
    assert "TRANSITIONS OF poems" not in done.stdout


def test_the_page_needs_nothing_else_and_its_path_is_printed(runs: Path, orchestrator: Command) -> None:
    done = orchestrator("report", "books", "poems", "-o", "html")
    page = runs / "books" / "report-with-poems.html"
    assert done.returncode == 0 and done.stdout.strip() == str(page)
    text = page.read_text()
    assert text.count("<svg") == 4  # time, workers of each, transitions of one
    assert "<script" not in text and 'src="http' not in text and "exposed communication" in text
    elsewhere = runs.parent / "page.html"
    assert orchestrator("report", "books", "-o", "html", "--out", "page.html").stdout.strip() == str(elsewhere)
    assert elsewhere.read_text().count("<svg") == 3
    gone = orchestrator("report", "books", "-o", "html", "--out", "nowhere/page.html")
    assert gone.returncode == 104 and "can't be written" in gone.stderr and "Nothing was written" in gone.stderr


def test_the_page_shows_the_loads_of_experts_of_a_run_that_has_them(runs: Path, orchestrator: Command) -> None:
    story = Story()
    story.start(2)
    story.train(30, loads=((3, 1), (0, 4)))
    write(story, runs / "routed", JOB)
    text = (page := Path(orchestrator("report", "poems", "routed", "-o", "html").stdout.strip())).read_text()
    assert page.name == "report-with-routed.html"
    assert text.count("<svg") == 1 + 2 + 1 and text.count("<!-- MoE layer") == 2
    assert "routed: loads of experts" in text and "poems: loads of experts" not in text


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["bookz"], 102, "Did you mean `books`?"),
        (["books", "poem"], 102, "Did you mean `poems`?"),
        (["books", "--cost-per-worker-hour", "-1"], 2, "is -1.0; it must be a number of 0 or more"),
        (["books", "--watts-per-worker", "nan"], 2, "is nan; it must be a number of 0 or more"),
        (["books", "--out", "page.html"], 2, "Add -o html"),
        (["silent"], 101, "holds no event yet"),
    ],
    ids=["unknown", "unknown-other", "price", "power", "to", "empty"],
)
def test_invalid_report_requests_are_refused(
    runs: Path, orchestrator: Command, args: list[str], code: int, said: str
) -> None:
    (runs / "silent").mkdir(parents=True, exist_ok=True)
    Journal(DirectoryObjects(runs / "silent"))
    done = orchestrator("report", *args)
    assert done.returncode == code and said in done.stderr and done.stdout == "", done
    assert "Traceback" not in done.stderr
    assert list(runs.rglob("*.html")) == []


def test_a_model_whose_code_is_gone_has_no_operations_but_a_reason(
    here: Path, orchestrator: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    model: dict[str, Any] = {"entrypoint": "no_such_module:build"}
    write(eventful(), here / "runs" / "own", JobSpec.model_validate({"schema": "v1", "name": "own", "model": model}))
    told = json.loads(orchestrator("report", "own", "-o", "json").stdout)
    assert told["flops"] is None and "no_such_module" in told["flops_note"] and told["tokens"] == 20_000


def test_differing_worker_hours_are_reported() -> None:
    story = Story()
    story.start(4)
    story.train(2)
    story.kill(recover_s=300.0)  # below the least number of workers: only events tell that one was gone
    story.train(2)
    story.end("succeeded")
    (line,) = warnings(report_of("run", story.events))
    assert "don't agree" in line and "1% is expected" in line
    assert warnings(report_of("run", eventful().events)) == []


def test_tables_have_a_cell_for_each_run() -> None:
    reports = [report_of(name, eventful().events) for name in ("a", "b")]
    for table in tables(reports):
        assert {len(row) for row in table.rows} == {len(table.header)}
