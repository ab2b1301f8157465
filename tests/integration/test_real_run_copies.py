"""A run with two copies of each snapshot: a worker and its buddy are killed at once, and nothing published is lost."""

from pathlib import Path

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.cluster.actors import find
from orchestrator.cluster.calls import ask
from orchestrator.elastic.snapshot_layout import buddies_of
from orchestrator.protocol.status import RunPhase
from orchestrator.protocol.worker_report import Report
from orchestrator.spec.fault_tolerance import ProtectionSpec
from orchestrator.spec.workers import WorkersSpec
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.control import kill_at_once
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(400)]

STEPS, SIZE = 150, 3


@pytest.mark.slow
def test_a_worker_killed_with_its_buddy_costs_a_step_at_most_and_no_bit(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = small_job(texts, max_steps=STEPS, determinism="exact")
    changes = {
        "name": "copies",
        "workers": WorkersSpec(min=SIZE, max=SIZE, initial=SIZE),
        "protection": ProtectionSpec(copies=2),
        "storage": str(tmp_path / "runs"),
    }
    run = client.submit(job.model_copy(update=changes))
    status = until(client, run, lambda s: s.step > 10 and s.held_by == SIZE)
    members = {member.rank: member.worker for member in status.worker_group if member.rank is not None}
    victims = [members[rank] for rank in (0, buddies_of(["node"] * SIZE)[0])]
    reports: list[Report] = [ask(find(f"{run}/worker/{w}"), "call", "report", None, -1, 0.0) for w in victims]
    kill_at_once(report.process.pid for report in reports)
    status = until(client, run, lambda s: bool(s.recoveries) and s.recoveries[-1].stall_s is not None)
    recovery = status.recoveries[-1]
    print(f"killed {victims} after step {reports[0].step}: {recovery}")
    assert set(recovery.lost) == set(victims) and recovery.source == "memory" and recovery.state_identical
    assert recovery.steps_replayed <= 1 and recovery.steps_lost == 0
    assert recovery.step >= max(report.protection.committed for report in reports)
    killed = client.wait(run, timeout_s=300.0)
    assert killed.phase is RunPhase.SUCCEEDED and client.audit(run).ok, killed
    assert_same_tensors(killed, calm_run(job, killed, tmp_path / "calm"))
