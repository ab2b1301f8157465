"""Experts placed by load in real runs: by request and by themselves, without a changed bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.errors import UsageError
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.job import JobSpec
from orchestrator.spec.moe.experts import ExpertsSpec, PlacementSpec
from orchestrator.spec.workers import WorkersSpec
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]

SKEWED = {"bias_update_speed": 0.0, "num_experts_per_tok": 1}  # loads stay as uneven as new routers make them


def _job(texts: Path, tmp_path: Path, name: str, experts: dict[str, Any], **train: Any) -> JobSpec:
    placement = PlacementSpec(**experts)
    return small_job(texts, SKEWED, determinism="exact", **train).model_copy(
        update={
            "name": name,
            "workers": WorkersSpec(min=1, max=3, initial=3),
            "storage": str(tmp_path / "runs"),
            "experts": ExpertsSpec(placement=placement),
        }
    )


def _events(client: OrchestratorClient, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in client.events(run) if event["kind"] == kind]


@pytest.mark.slow
def test_an_exact_run_whose_experts_move_by_load_ends_with_the_bits_of_one_whose_experts_do_not(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = _job(texts, tmp_path, "balanced", {"num_redundant_experts": 3}, max_steps=300)
    run = client.submit(job)
    until(client, run, lambda s: s.step > 20)
    client.rebalance(run)
    until(client, run, lambda s: s.generation == 1)
    moved = until(client, run, lambda s: s.step > 60 and bool(s.rescales) and s.rescales[0].stall_s is not None)
    client.kill_worker(run, 1)
    until(client, run, lambda s: bool(s.recoveries) and s.workers_now == 3)
    client.rebalance(run)
    client.scale(run, 2)
    until(client, run, lambda s: s.workers_now == 2)
    ended = client.wait(run, timeout_s=250.0)
    first, *_ = events = _events(client, run, "experts_rebalanced")
    assert first["num_moved"] > 0 and first["after"] < first["before"] - 0.1
    assert moved.rescales[0].from_size == moved.rescales[0].to_size == 3
    assert len(_events(client, run, "rebalance_measured")) >= 1
    records = read_steps(Path(ended.run_dir))
    violations = {r.step: r.routing.experts.rank_violation for r in records if r.world_size == 3}
    before, after = (
        [v for step, v in violations.items() if v is not None and step in steps]
        for steps in (range(5, first["step"]), range(first["step"] + 1, first["step"] + 20))
    )
    assert sum(after) / len(after) < sum(before) / len(before) - 0.1, (events, before, after)
    calm = calm_run(job, ended, tmp_path / "calm")
    assert [(r.loss, r.update.grad_norm) for r in records] == [(r.loss, r.update.grad_norm) for r in calm.records]
    assert_same_tensors(ended, calm)


@pytest.mark.slow
def test_a_run_places_its_experts_by_itself_and_refuses_to_where_it_cannot(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = _job(texts, tmp_path, "by-itself", {"policy": "load", "num_redundant_experts": 3}, max_steps=3000)
    run = client.submit(job)
    until(client, run, lambda s: bool(s.rescales))
    (event, *_) = _events(client, run, "experts_rebalanced")
    assert event["step"] >= 20
    client.scale(run, 1)
    step = until(client, run, lambda s: s.workers_now == 1).step
    until(client, run, lambda s: s.step > step + 2)
    with pytest.raises(UsageError, match="its one worker has all experts"):
        client.rebalance(run)
    client.stop(run, now=True)
    client.wait(run, timeout_s=60.0)
    with pytest.raises(UsageError, match="has ended"):
        client.rebalance(run)
