"""Runs whose controller has not spoken yet, and those behind them in the queue."""

import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest

from orchestrator.policy.state.config import RunLimits
from orchestrator.protocol.scaling import ScalingView
from orchestrator.scheduler import autoscaler
from orchestrator.scheduler.admission import newcomer
from orchestrator.scheduler.autoscaler import EXPECTED_S, Autoscaler, _shares
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import MANUAL

NOW_S = time.time()


@pytest.fixture(autouse=True)
def cluster() -> Iterator[None]:
    """One node on which one CPU is free."""
    with (
        patch.object(autoscaler, "labels_of_nodes", lambda: {"n": {}}),
        patch.object(autoscaler, "draining_nodes", dict),
        patch.object(autoscaler, "free_on_nodes", lambda _: {"n": {"CPU": 1.0}}),
        patch.object(autoscaler, "_homes", lambda _: {"low": ["n", "n"]}),
    ):
        yield


def _run(name: str, least: int, queued_s: float | None = None, priority: int = 0) -> ScalingView:
    return ScalingView(name, MANUAL, {"CPU": 1.0}, least, least, least, priority=priority, queued_s=queued_s)


def test_runs_behind_it_wait_and_no_run_makes_room_for_it() -> None:
    low, third = replace(_run("low", 2), admitted_s=NOW_S - 1e4, begun_s=NOW_S - 1e4), _run("third", 1, NOW_S)
    slow = _run("slow", 3, NOW_S - 1.0, priority=5)
    assert _shares([low, third], [])["third"].places == 1
    shares = _shares([low, third], [slow])
    assert shares["third"].places == 0 and shares["third"].grant.why == "there is no room for 1 worker"
    assert shares["low"].places == 2 and shares["low"].grant.workers is None
    heard = _shares([low, third, slow], [])
    assert heard["low"].places == 0 and heard["slow"].places == 3  # once it has spoken


def test_runs_before_it_in_the_queue_do_not_wait() -> None:
    assert _shares([_run("first", 1, NOW_S - 2.0)], [_run("slow", 1, NOW_S - 1.0)])["first"].places == 1


def test_a_run_is_expected_until_its_controller_reports_ends_or_is_late() -> None:
    now_s = time.time()  # not when this file was read, which may be long ago
    scaler, late = Autoscaler(), _run("late", 1, now_s - EXPECTED_S - 1.0)
    runs = {
        run.run_id: run for run in (_run("heard", 1, now_s), _run("gone", 1, now_s), _run("starts", 1, now_s), late)
    }
    for run in runs.values():
        scaler.expect(run)
    scaler._forget(runs, {"heard"}, {"heard", "starts", "late"})
    assert set(scaler._expected) == {"starts"}
    again = replace(runs["starts"], queued_s=now_s + 1.0)  # submitted anew while the old one was asked for
    scaler.expect(again)
    scaler._forget(runs, {"starts"}, set())
    assert scaler._expected == {"starts": again}


def test_a_newcomer_has_the_least_of_its_first_stage() -> None:
    stages = [{"name": "s", "until": {"steps": 10}, "workers": {"min": 3, "max": 4}}, {"name": "t"}]
    job = JobSpec.model_validate(
        {
            "name": "a",
            "workers": {"min": 1, "max": 4, "initial": 3},
            "autoscale": {"policy": "available"},
            "curriculum": {"stages": stages},
        }
    )
    limits = RunLimits.of("a", job)
    assert newcomer(limits, job, 3).least == 3
    assert newcomer(limits, job, 3, "t").least == 1
    assert newcomer(limits, job, 2, by_hand=True).least == 2
