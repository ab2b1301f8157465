"""A run of one worker beside a warm standby on a local cluster, whose worker is killed: nothing published is lost."""

import os
import signal
import time
from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.protocol.status import RunPhase, RunStatus
from orchestrator.protocol.worker_report import Report
from orchestrator.spec.workers import WorkersSpec
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]


def _report(run: str, worker: str) -> Report:
    report: Report = ask(find(f"{run}/worker/{worker}"), "call", "report", None, -1, 0.0)
    return report


def _member(status: RunStatus) -> str:
    return next(member.worker for member in status.worker_group if member.rank == 0)


def _kill_when_kept(client: OrchestratorClient, run: str) -> str:
    """Kill the only member after its keeper has acknowledged a few steps. Its id, once training has gone on."""
    recoveries = len(client.get(run).recoveries)
    kept = until(client, run, lambda s: s.workers_now == 1 and s.held_by == 2)
    worker = _member(until(client, run, lambda s: s.step > kept.step + 10))
    report = _report(run, worker)
    os.kill(report.process.pid, signal.SIGKILL)
    began_s = time.monotonic()
    status = until(client, run, lambda s: len(s.recoveries) > recoveries and s.recoveries[-1].stall_s is not None)
    recovery = status.recoveries[-1]
    print(f"killed {worker} after step {report.step}: {recovery}; seen after {time.monotonic() - began_s:.2f} s")
    assert (recovery.lost, recovery.cause, recovery.source) == ((worker,), "worker", "memory")
    assert recovery.steps_replayed <= 1 and recovery.steps_lost == 0 and recovery.state_identical
    assert recovery.step >= report.protection.committed and status.held_by in (1, 2)
    return worker


def test_a_killed_lone_worker_costs_a_step_at_most_and_no_bit(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = small_job(texts, max_steps=1_000_000, determinism="exact", lr_scheduler={"kind": "constant"})
    workers = WorkersSpec(min=1, max=1, initial=1, standby=1)
    run = client.submit(job.model_copy(update={"name": "alone", "workers": workers, "storage": str(tmp_path / "runs")}))
    assert _kill_when_kept(client, run) != _kill_when_kept(client, run)  # the replacement keeps in turn
    client.stop(run)
    killed = client.wait(run, timeout_s=240.0)
    assert killed.phase is RunPhase.STOPPED and client.audit(run).ok, killed
    assert_same_tensors(killed, calm_run(job, killed, tmp_path / "calm"))
