"""Events of workers' numerics, one each, also across controllers."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from orchestrator.controller.recorder import StepRecorder
from orchestrator.controller.startup import OpenedRun
from orchestrator.protocol.worker_phase import Phase
from orchestrator.protocol.worker_report import HealthReport, ProcessReport, Report, Saturation
from orchestrator.run_records.journaled_run import JournaledRun
from orchestrator.run_records.run_history import user_events
from orchestrator.spec.job import JobSpec
from orchestrator.storage.tasks import run_inline
from tests.unit.policy.imagined import limits_of

FINGERPRINT = {"torch": "2.9", "processor": "a", "threads": 1}


def _account(run_dir: Path) -> StepRecorder:
    """Of a controller that has just come."""
    memory = JournaledRun(run_dir, limits_of())
    run = OpenedRun("run", run_dir, JobSpec(name="run"), limits_of(), memory)
    return StepRecorder(run, Mock(), Mock(), Mock())


def _report(numerics: str = "", saturated: Saturation | None = None) -> Report:
    health, process = HealthReport(saturated=saturated), ProcessReport(numerics=numerics)
    return Report("w0", 1, 0, Phase.TRAINING, -1, -1, -1, health=health, process=process)


def _events(run_dir: Path) -> list[tuple[Any, ...]]:
    events = user_events(run_dir)
    return [tuple(v for k, v in event.items() if k not in ("seq", "term", "time")) for event in events]


def test_numerics_are_those_of_the_first_worker_and_differences_are_reported_once(tmp_path: Path) -> None:
    other = FINGERPRINT | {"processor": "b"}
    for _ in range(2):  # a second controller knows what the first one had heard
        account = _account(tmp_path)
        for worker, found in (("w0", FINGERPRINT), ("w1", FINGERPRINT), ("w2", other), ("w2", other)):
            run_inline(account.hear(worker, _report(numerics=json.dumps(found))))
        run_inline(account.hear("w3", _report(numerics="")))  # of a run that isn't exact
    assert _events(tmp_path) == [("numerics", FINGERPRINT), ("numerics_differ", "w2", {"processor": "a -> b"})]


def test_a_gradient_too_large_is_journalled_with_its_parameter(tmp_path: Path) -> None:
    for _ in range(2):
        account = _account(tmp_path)
        run_inline(account.hear("w0", _report()))
        for step in (4, 4, 5):
            run_inline(account.hear("w1", _report(saturated=Saturation(step, ("head",)))))
    assert _events(tmp_path) == [("gradient_saturated", "w1", 4, ["head"]), ("gradient_saturated", "w1", 5, ["head"])]


@pytest.mark.parametrize("missing", ["processor", "threads"])
def test_a_tensor_missing_on_one_side_differs(tmp_path: Path, missing: str) -> None:
    account = _account(tmp_path)
    run_inline(account.hear("w0", _report(numerics=json.dumps(FINGERPRINT))))
    run_inline(account.hear("w1", _report(numerics=json.dumps({k: v for k, v in FINGERPRINT.items() if k != missing}))))
    assert _events(tmp_path)[1][2] == {missing: f"{FINGERPRINT[missing]} -> None"}
