"""Another number of experts in real runs, by stages and by request, without a lost step or a changed bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import OrchestratorClient
from orchestrator.errors import UsageError
from orchestrator.protocol.messages import ExpertRequest
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.curriculum import CurriculumSpec, StageSpec, UntilSpec
from orchestrator.spec.fault_tolerance import CheckpointSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.moe.experts import ExpertNumber, ExpertsSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.state.fingerprint import whole
from tests.support.calm_runs import tensors_of
from tests.support.real_runs import until
from tests.support.texts import small_job

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(400)]

GROWS, SHRINKS, LAST = 40, 120, 200


def _job(texts: Path, tmp_path: Path, name: str, **sections: Any) -> JobSpec:
    stages = (
        StageSpec(name="few", until=UntilSpec(steps=GROWS)),
        StageSpec(name="many", until=UntilSpec(steps=SHRINKS - GROWS), experts=ExpertNumber(num_experts=12, noise=0.1)),
        StageSpec(name="few-again", experts=ExpertNumber(num_experts=4)),
    )
    return small_job(texts, {"n_routed_experts": 4}, determinism="exact", max_steps=LAST).model_copy(
        update={
            "name": name,
            "workers": WorkersSpec(min=1, max=3, initial=2, standby=1),
            "storage": str(tmp_path / "runs"),
            "checkpoint": CheckpointSpec(every=GROWS),
            "curriculum": CurriculumSpec(stages=stages),
            **sections,
        }
    )


def _results(run_dir: str) -> list[tuple[float, float, str]]:
    return [(r.loss, r.update.grad_norm, whole(r.state.digests)) for r in read_steps(Path(run_dir))]


@pytest.mark.slow
def test_a_run_that_is_killed_scaled_and_resumed_around_its_changes_ends_with_the_bits_of_an_untouched_one(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    calm = client.submit(_job(texts, tmp_path, "calm"))
    with pytest.raises(UsageError, match="change its number of experts, at steps that follow from its job"):
        client.stage(calm, "next")
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
    assert min(record.routing.experts.utilisation for record in read_steps(Path(ended.run_dir))[-20:]) > 0.5
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_a_run_gets_the_number_of_experts_that_is_asked_for(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = _job(texts, tmp_path, "asked", experts=ExpertsSpec(saliency=True), curriculum=None)
    run = client.submit(job.model_copy(update={"train": job.train.model_copy(update={"max_steps": 3000})}))
    until(client, run, lambda s: s.step > 70)
    for wanted, why in (
        (ExpertRequest(num_experts=6), "6 is no multiple of 4"),
        (ExpertRequest(num_experts=1), "each token visits 2 experts"),
    ):
        with pytest.raises(UsageError, match=why):
            client.set_experts(run, wanted)
    client.set_experts(run, ExpertRequest(num_experts=8, reinit_ratio=0.25))
    until(client, run, lambda s: bool(s.rescales))
    client.kill_worker(run, 0)
    until(client, run, lambda s: bool(s.recoveries) and s.workers_now == 2)
    client.set_experts(run, ExpertRequest(num_experts=8, dissolve=True))
    until(client, run, lambda s: len(s.rescales) > 1 and s.rescales[-1].experts == (8, 8))
    until(client, run, lambda s: s.step > 140)  # the averages of these experts are in the record of step 128
    client.set_experts(run, ExpertRequest(num_experts=3, keep="reap"))
    status = until(client, run, lambda s: s.rescales[-1].experts == (8, 3) and s.rescales[-1].stall_s is not None)
    client.stop(run)
    client.wait(run, timeout_s=60.0)
    events = [event for event in client.events(run) if event["kind"] == "experts_changed"]
    assert [(event["before"], event["after"], event["request"]) for event in events] == [
        (4, 8, 1),
        (8, 8, 2),
        (8, 3, 3),
    ]
    records = {record.step: record for record in read_steps(Path(status.run_dir))}
    for event in events:
        before, after = (records[event["step"] + number].routing.experts.num_experts for number in (0, 1))
        assert (before, after) == (event["before"], event["after"])
    with pytest.raises(UsageError, match="has ended"):
        client.set_experts(run, ExpertRequest(num_experts=6))
