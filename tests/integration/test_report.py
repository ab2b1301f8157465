"""The report of a real run: its accounts agree with one another."""

import time
from pathlib import Path
from statistics import median

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.policy.report.report import Rates
from orchestrator.policy.report.worker_hours import RECONCILES
from orchestrator.policy.state.progress import STALL_STEPS
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.submission.report import read_report
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]

STRETCH_S = 12.0  # of training between two events: moves and ends take tenths of a second, which are not to count


@pytest.mark.slow
def test_worker_hours_of_a_real_run_reconcile_across_a_rescale_a_kill_and_a_pause(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    changes = {
        "name": "accounted",
        "workers": WorkersSpec(min=1, max=3, initial=3),
        "storage": str(tmp_path / "runs"),
        "checkpoint": CheckpointSpec(every=50, keep_last=2),
    }
    job: JobSpec = small_job(texts, max_steps=100_000).model_copy(update=changes)
    run = client.submit(job)
    until(client, run, lambda s: s.step > 0)
    time.sleep(STRETCH_S)
    client.scale(run, 2)
    until(client, run, lambda s: bool(s.rescales) and s.rescales[-1].stall_s is not None)
    time.sleep(STRETCH_S)
    client.kill_worker(run, 1)
    until(client, run, lambda s: bool(s.recoveries) and s.recoveries[-1].stall_s is not None)
    time.sleep(STRETCH_S)
    client.pause(run)
    paused = client.wait(run, timeout_s=250.0)
    run_dir = Path(paused.run_dir)
    time.sleep(3.0)
    client.resume(run, workers=2)
    until(client, run, lambda s: s.step > paused.step + 1)
    going_on = read_report(run_dir, Rates())  # while it trains
    assert going_on.outcome == "" and going_on.steps >= paused.step
    time.sleep(STRETCH_S)
    client.stop(run)
    ended = client.wait(run, timeout_s=250.0)

    told = read_report(run_dir, Rates(cost_per_worker_hour=1.0, watts_per_worker=100.0))
    assert told.workers.difference is not None and abs(told.workers.difference) <= RECONCILES
    assert told.workers.held >= told.workers.members > 0.0
    assert [span.outcome for span in told.attempts] == ["paused", "stopped"] and told.paused_s > 3.0
    steps = read_steps(run_dir)
    assert told.steps + sum(not record.update.applied for record in steps) == ended.step
    assert all(0.0 <= (record.timing.communication_wait_s or -1.0) <= record.timing.step_s for record in steps)
    known = [spent.seconds for spent in told.time if spent.seconds is not None]
    assert sum(known) == pytest.approx(told.elapsed_s) and len(known) == len(told.time)  # all of it was measured
    assert told.goodput is not None and 0.0 < told.goodput < 1.0
    kinds = [each.kind for each in told.transitions]
    assert kinds.count("recovery") == 1 and kinds[0] == "rescale"
    (recovery,) = [each for each in told.transitions if each.kind == "recovery"]
    assert recovery.detect_s > 0.0 and recovery.transfer_s and recovery.rebuild_s
    for each in told.transitions:
        assert each.total_s < 10.0
    measured = {change.step + 1: change.stall_s for change in (*paused.rescales, *paused.recoveries)}
    for each in told.transitions:
        # The status counts from vote to vote, less a typical step; the report, less the first one.
        first, *more = (r.timing.step_s for r in steps if r.generation == each.generation)
        typical = median([first, *more[: STALL_STEPS - 1]])
        assert each.total_s + first - typical == pytest.approx(measured[each.step], abs=0.5)
    assert told.flops is not None and told.flops.parameters > 0 and told.cost.per_million_tokens is not None
