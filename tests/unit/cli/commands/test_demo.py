"""`demo`: the job file in the package, and the run that it starts."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.commands import demo
from orchestrator.spec.job_file.loading import load_job

ROOT = Path(__file__).parents[4]


def test_the_job_of_the_package_is_the_quickstart() -> None:
    quickstart = (ROOT / "jobs" / "quickstart.yaml").read_bytes()
    assert demo.JOB.read_bytes() == quickstart, "cp jobs/quickstart.yaml orchestrator/cli/quickstart.yaml"


def test_the_kill_falls_between_the_rescales() -> None:
    job = load_job(ROOT / "jobs" / "quickstart.yaml")
    first, second = (change.at_step for change in job.workers.schedule)
    assert first < demo.KILL_AT < second < job.train.max_steps and job.name == demo.NAME


def test_a_demo_is_a_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, Any]] = []
    monkeypatch.setattr(
        demo,
        "run_here",
        lambda job, name, overrides, address, **options: runs.append(
            {"job": load_job(job, overrides), "name": name, "address": address} | options
        ),
    )
    storage = tmp_path / "a: b's"
    demo.demo(storage=storage)
    (storage / demo.NAME).mkdir(parents=True)
    demo.demo(storage=storage)
    demo.demo(name="mine", storage=storage)
    names = [run["name"] for run in runs]
    assert names[0] == "quickstart" and names[1].startswith("quickstart-") and names[2] == "mine"
    for run in runs:
        assert (
            run["address"] is None
            and not run["leaves_run"]
            and run["kill_at"] == demo.KILL_AT
            and run["job"].storage == str(storage)
        )
