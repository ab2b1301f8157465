"""Another number of experts in real runs, by schedule and by request, without a lost step or a changed bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.moe.experts import ExpertsSpec, ScheduledExperts
from orchestrator.spec.workers import WorkersSpec
from orchestrator.state.fingerprint import whole
from tests.support.calm_runs import tensors_of
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(400)]

GROWS, SHRINKS, LAST = 40, 120, 200


def _job(texts: Path, tmp_path: Path, name: str, **sections: Any) -> JobSpec:
    schedule = (
        ScheduledExperts(at_step=GROWS, num_experts=12, noise=0.1),
        ScheduledExperts(at_step=SHRINKS, num_experts=4, keep="random"),
    )
    return small_job(texts, {"n_routed_experts": 4}, determinism="exact", max_steps=LAST).model_copy(
        update={
            "name": name,
            "workers": WorkersSpec(min=1, max=3, initial=2, standby=1),
            "storage": str(tmp_path / "runs"),
            "checkpoint": CheckpointSpec(every=GROWS),
            "experts": ExpertsSpec(schedule=schedule),
            **sections,
        }
    )


def _results(run_dir: str) -> list[tuple[float, float, str]]:
    return [(r.loss, r.update.grad_norm, whole(r.state.digests)) for r in read_steps(Path(run_dir))]


def test_a_run_that_is_killed_scaled_and_resumed_around_its_changes_ends_with_the_bits_of_an_untouched_one(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    calm = client.submit(_job(texts, tmp_path, "calm"))
    untouched = client.wait(calm, timeout_s=200.0)
    assert [change.experts for change in untouched.rescales] == [(4, 12), (12, 4)]
    run = client.submit(_job(texts, tmp_path, "stormy"))
    until(client, run, lambda s: s.step >= GROWS - 3)
    client.kill_worker(run, 0)
    until(client, run, lambda s: s.step > GROWS + 5)
    client.scale(run, 3)
    until(client, run, lambda s: s.workers_now == 3)
    client.kill_worker(run, 1)
    until(client, run, lambda s: s.step > SHRINKS - 10)
    client.pause(run)
    client.wait(run, timeout_s=60.0)
    client.resume(run, workers=1)
    ended = client.wait(run, timeout_s=200.0)
    theirs, ours = (_results(status.run_dir) for status in (untouched, ended))
    assert [step for step, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b] == []
    one, other = tensors_of(untouched.checkpoint), tensors_of(ended.checkpoint)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
