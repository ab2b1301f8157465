"""Tokens sent to experts in a run of real workers: their settings in the job file hold through rescales."""

from pathlib import Path

import pytest

from orchestrator.protocol.usage import TrafficKind
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.job import EvalSpec
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("limit", ["ranks_per_token", "nodes_per_token"])
def test_a_limited_token_goes_to_one_place_in_every_world(
    limit: str, texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    communication = CommunicationSpec.model_validate({"tokens": "int8", limit: 1})
    job = small_job(texts, {"n_routed_experts": 8}).model_copy(
        update={"communication": communication, "eval": EvalSpec()}
    )
    nodes = ("a", "a", "b", "b")
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        plans = [worker_group.plan(worker_group.ids, nodes=nodes)]
        worker_group.start(plans[0])
        for size in (2, 3):
            worker_group.await_step(worker_group.newest_step + 4)
            plans.append(worker_group.rescale(worker_group.ids[:size], nodes=nodes[:size]))
        worker_group.await_finished()
    records = [record for _, record in sorted(worker_group.records.items())]
    assert len(records) == STEPS and all(record.update.applied for record in records)
    assert records[-1].loss < records[0].loss - 0.5
    placements = {plan.generation: plan.placement for plan in plans}
    model = job.model
    layers = model.num_hidden_layers - model.first_k_dense_replace
    for record in records:
        places = 1 if limit == "ranks_per_token" else 2  # ranks of a node
        rows = 2 * layers * record.batch.tokens * places  # there and back
        gates = 4 * max(len(placements[record.generation].experts_of(rank)) for rank in range(record.world_size))
        assert 0 < record.communication.traffic[TrafficKind.DISPATCH].sent <= rows * (model.hidden_size + 4 + gates)
        assert 0 < record.communication.traffic[TrafficKind.COMBINE].sent <= rows * (model.hidden_size + 4)


def test_tokens_leave_their_node_only_for_what_it_lacks(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    job = small_job(texts, {"n_routed_experts": 2}).model_copy(update={"eval": EvalSpec()})
    nodes = ("a", "a", "b", "b")
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        plans = [worker_group.plan(worker_group.ids, nodes=nodes)]
        worker_group.start(plans[0])
        for size in (3, 4):
            worker_group.await_step(worker_group.newest_step + 4)
            plans.append(worker_group.rescale(worker_group.ids[:size], nodes=nodes[:size]))
        worker_group.await_finished()
    assert [len(plan.world.members) for plan in plans] == [4, 3, 4]
    seen: dict[int, set[bool]] = {}
    for record in worker_group.records.values():
        sent, across = (
            sum(
                getattr(record.communication.traffic[kind], what)
                for kind in (TrafficKind.DISPATCH, TrafficKind.COMBINE)
            )
            for what in ("sent", "across")
        )
        assert 0 <= across < sent
        seen.setdefault(record.world_size, set()).add(across > 0)
    assert seen == {4: {False}, 3: {True}}  # a node of one worker lacks the other expert
