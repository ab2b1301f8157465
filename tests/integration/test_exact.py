"""`train.determinism: exact` with real workers in real processes: the same bits whatever the world was."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import Store

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.client import OrchestratorClient
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_spec import saved_shapes
from orchestrator.model.factory import catalogue
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.job import JobSpec
from orchestrator.spec.workers import WorkersSpec
from orchestrator.state.fingerprint import whole
from tests.support import small
from tests.support.calm_runs import assert_same_tensors, calm_run
from tests.support.own_models import linear, own_spec
from tests.support.ranks import Ranks
from tests.support.real_runs import until
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup

ALL_WORLDS = [2, 4, 3, 1, 2]  # sizes that one run passes through; each of its steps is compared
PLAIN = {"precision": "fp32", "zero_stage": 1}
Run = tuple[list[tuple[Any, ...]], dict[str, bytes]]


def _step_results(worker_group: LocalWorkerGroup) -> list[tuple[Any, ...]]:
    assert sorted(worker_group.records) == list(range(STEPS))
    records = [record for _, record in sorted(worker_group.records.items())]
    assert all(len(r.state.digests) == (r.world_size if worker_group.is_exact else 0) for r in records)
    return [
        (
            r.loss,
            r.update.grad_norm,
            r.validation_loss,
            replace(r.routing.experts, swing=None, rank_violation=None),
            r.update.applied,
            whole(r.state.digests),
        )
        for r in records
    ]


def _state(worker_group: LocalWorkerGroup, job: JobSpec) -> dict[str, bytes]:
    """Every tensor of the checkpoint after the last step."""
    members = worker_group.directive.current.world.members if worker_group.directive.current else ()
    shards = [worker_group.final[w].shards[-1] for w in members]
    params, buffers = catalogue(job.model, VOCAB)
    wanted = saved_shapes(inventory(params, job, buffers))
    directory = Path(worker_group.job.storage_dir) / "checkpoints"
    written = read_shards(directory, shards, term=1)
    path = commit(directory, manifest_of(written, run_id="test", term=1, shapes=wanted))
    with CheckpointReader(path) as reader:
        return {name: reader.read(name, 0, t.numel).tobytes() for name, t in reader.manifest.tensors.items()}


def _run(job: JobSpec, store_dir: Path, directory: Path, worlds: list[int]) -> Run:
    with LocalWorkerGroup(job, store_dir, directory, size=max(worlds)) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[: worlds[0]]))
        for size in worlds[1:]:
            worker_group.await_step(worker_group.newest_step + 3)
            worker_group.rescale(worker_group.ids[-size:])
        worker_group.await_finished()
        return _step_results(worker_group), _state(worker_group, job)


def _differences(one: Run, other: Run) -> tuple[list[int], list[str]]:
    steps = [step for step, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if a != b]
    assert one[1].keys() == other[1].keys()
    return steps, [name for name in one[1] if one[1][name] != other[1][name]]


@pytest.mark.long_emulated
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, PLAIN),
        (
            {
                "num_experts_per_tok": 3,
                "n_shared_experts": 1,
                "hidden_size": 36,  # no alignment
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "moe_intermediate_size": 33,
            },
            {"precision": "fp32", "zero_stage": 2},
        ),
        pytest.param({}, {"precision": "bf16", "zero_stage": 1}, marks=pytest.mark.slow),
        ({}, {"optimizer": {"name": "muon", "groups": [{"params": ["head"], "lr_scale": 0.5}]}, "ema": {"decay": 0.9}}),
        (
            {"moe_intermediate_size": 36, "hidden_size": 40},
            {
                "precision": "bf16",
                "zero_stage": 2,
                "trainable": ["*.experts.*", "*.attention.*", "head"],
                "ema": {"decay": 0.9},
            },
        ),
        ({"router": {"scorer": "attention", "rank": 3, "selection": "top_p"}}, {"zero_stage": 2}),
        ({"router": {"scorer": "context", "num_heads": 2, "capacity_factor": 0.75}}, {}),
        pytest.param({"router": {"selection": "expert_choice"}}, {}, marks=pytest.mark.slow),
        pytest.param({}, {"optimizer": {"name": "adafactor"}, "lr": 0.2, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({}, {"optimizer": {"name": "lion"}, "lr": 1e-3, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({}, {"optimizer": {"name": "sgd"}, "lr": 0.5, "zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"moe_intermediate_size": 33, "scoring_func": "softmax", "num_experts_per_tok": 4},
            {"gradient_clipping": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_worlds_end_with_the_same_bits(
    texts: Path, store_dir: Path, tmp_path: Path, model: dict[str, Any], train: dict[str, Any]
) -> None:
    job = small_job(texts, model, determinism="exact", **train)
    alone, *others = [[1], ALL_WORLDS] if model or train != PLAIN else [[1], [4], ALL_WORLDS]
    undisturbed = _run(job, store_dir, tmp_path / "alone", alone)
    for number, worlds in enumerate(others):
        assert _differences(undisturbed, _run(job, store_dir, tmp_path / str(number), worlds)) == ([], []), worlds
    losses = [record[0] for record in undisturbed[0]]
    assert losses[-1] < losses[0] - 0.3 and np.isfinite(undisturbed[0][-1][1])


@pytest.mark.usefixtures("device")
def test_dropout_of_a_user_s_model_is_the_same_in_every_world(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    layers, forward = "self.drop = nn.Dropout(0.2)", "return self.head(self.drop(self.embedding(tokens)))"
    models = [
        own_spec(tmp_path, linear(layers=layers.replace("0.2", rate), forward=forward)) for rate in ("0.2", "0.0")
    ]
    with_it, without = (small_job(texts, determinism="exact").model_copy(update={"model": model}) for model in models)
    first, *others = [
        _run(with_it, store_dir, tmp_path / str(n), worlds) for n, worlds in enumerate(([1], [3], [2, 3, 1]))
    ]
    assert all(_differences(first, other) == ([], []) for other in others)
    assert _run(without, store_dir, tmp_path / "without", [1])[0][-1] != first[0][-1]


@pytest.mark.long_emulated
@pytest.mark.usefixtures("device")
def test_without_it_worlds_differ(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    job = small_job(texts)
    runs = [_run(job, store_dir, tmp_path / str(number), [size]) for number, size in enumerate((1, 3))]
    steps, names = _differences(*runs)
    assert steps and names


def _weights(
    rank: int, world_size: int, store: Store, prefix: str, placement: ExpertPlacement, stage: int
) -> dict[str, torch.Tensor]:
    """This rank's, after some steps."""
    train = small.train_spec(zero_stage=stage, determinism="exact")
    groups, _, engine = small.build("deepspeed", store, prefix, rank, placement, train, bucket_mb=0.01)
    small.train_steps(engine, groups, range(4))
    found = {name: held.data.cpu() for name, held in engine.ranges() if name.startswith("param/")}
    engine.close()
    return found


@pytest.fixture(scope="module", params=[1, 2])
def alone(request: pytest.FixtureRequest, ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]]:
    """A ZeRO stage, and the weights that one rank has with it."""
    (weights,) = ranks.run(_weights, 1, ExpertPlacement.balanced(4, 1), request.param)
    return request.param, weights


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(ExpertPlacement(4, 3, ((0,), (0,), (0,), (2,))), id="a rank without experts"),
        pytest.param(ExpertPlacement(4, 3, ((0, 1), (1, 2), (0,), (0, 2))), id="overlapping replica sets"),
        pytest.param(ExpertPlacement.balanced(4, 5), id="more ranks than experts"),
    ],
)
def test_the_placement_of_experts_changes_no_bit(
    ranks: Ranks, placement: ExpertPlacement, alone: tuple[int, dict[str, torch.Tensor]]
) -> None:
    stage, expected = alone
    for weights in ranks.run(_weights, placement.world_size, placement, stage):
        assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


# By layer other holders, uneven ones, and replicas; the last one is for two workers.
BY_LAYER = (
    {"layers.1.mlp": ((0,), (0,), (0,), (1,), (2,), (2,)), "layers.2.mlp": ((0, 1, 2), (1,), (2,), (0,), (1, 2), (2,))},
    {"layers.2.mlp": ((2,), (2,), (2,), (2,), (0,), (1,))},
    {},
)


@pytest.mark.long_emulated
@pytest.mark.usefixtures("device")
def test_experts_of_each_layer_move_by_themselves_and_change_no_bit(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    job = small_job(texts, {"num_hidden_layers": 3}, determinism="exact")
    undisturbed = _run(job, store_dir, tmp_path / "alone", [1])
    with LocalWorkerGroup(job, store_dir, tmp_path / "moved", size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        for layers in BY_LAYER:
            worker_group.await_step(worker_group.newest_step + 3)
            placement = ExpertPlacement(6, 3, ExpertPlacement.balanced(6, 3).holders, tuple(layers.items()))
            plan = worker_group.rescale(worker_group.ids, placement=placement)
            assert plan.placement.layers == tuple(layers.items())
        placement = ExpertPlacement(6, 3, ExpertPlacement.balanced(6, 3).holders, tuple(BY_LAYER[0].items()))
        worker_group.await_step(worker_group.newest_step + 3)
        worker_group.rescale(worker_group.ids, placement=placement)
        worker_group.await_step(worker_group.newest_step + 3)
        worker_group.members["w1"].kill()
        plan = worker_group.recover(["w0", "w2"])
        assert {layer for layer, _ in plan.placement.layers} == {"layers.1.mlp", "layers.2.mlp"}
        worker_group.await_finished()
        moved = _step_results(worker_group), _state(worker_group, job)
    assert _differences(undisturbed, moved) == ([], [])


def _too_large(rank: int, world_size: int, store: Store, prefix: str) -> tuple[bool, bool, list[str], tuple[str, ...]]:
    """One rank's micro-batch has a gradient too large for an exact sum: all ranks leave the step out, and that one
    reports it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("orchestrator.worker").addHandler(handler)
    train = small.train_spec(determinism="exact")
    placement = ExpertPlacement.balanced(4, world_size)
    groups, model, engine = small.build("deepspeed", store, prefix, rank, placement, train)
    small.train_steps(engine, groups, range(1))
    before = [(name, held.data.clone()) for name, held in engine.ranges()]
    hook = model.head.register_hook(lambda grad: grad * 1e6) if rank == 1 else None  # type: ignore[no-untyped-call]
    engine.accumulate(small.micro_batch(1, rank), 100, last=True)
    outcome = engine.step(3e-3)
    same = all(torch.equal(old, held.data) for (_, old), (_, held) in zip(before, engine.ranges(), strict=True))
    if hook is not None:
        hook.remove()
    small.train_steps(engine, groups, range(1, 2))  # and the next one is sound
    engine.close()
    logging.getLogger("orchestrator.worker").removeHandler(handler)
    return outcome.applied, same, said, outcome.saturated


def test_a_gradient_too_large_for_an_exact_sum_is_left_out_by_all_and_named(ranks: Ranks) -> None:
    (first, unchanged, silent, _), (second, unchanged_too, (said,), names) = ranks.run(_too_large, 2)
    assert not first and not second and unchanged and unchanged_too and silent == [] and names == ("head",)
    assert "the gradient of head is over" in said


@pytest.mark.ray
@pytest.mark.journey
@pytest.mark.timeout(300)
def test_a_run_that_was_scaled_killed_paused_and_resumed_ends_with_the_bits_of_one_that_was_not(
    client: OrchestratorClient, texts: Path, tmp_path: Path
) -> None:
    job = small_job(texts, max_steps=300, determinism="exact")
    workers = WorkersSpec(min=1, max=3, initial=2)
    run = client.submit(
        job.model_copy(update={"name": "eventful", "workers": workers, "storage": str(tmp_path / "runs")})
    )
    until(client, run, lambda s: s.step > 10)
    client.scale(run, 3)
    step = until(client, run, lambda s: s.workers_now == 3).step
    until(client, run, lambda s: s.step > step + 10)
    client.kill_worker(run, 1)
    killed = until(client, run, lambda s: bool(s.recoveries) and s.workers_now == 3)
    assert len(killed.recoveries) == 1
    until(client, run, lambda s: s.step > killed.step + 10)
    client.pause(run)
    assert client.wait(run, timeout_s=250.0).step < 300
    client.resume(run, workers=1)
    until(client, run, lambda s: s.workers_now == 1)
    client.scale(run, 2)
    eventful = client.wait(run, timeout_s=250.0)
    with CheckpointReader(Path(str(eventful.checkpoint))) as reader:
        assert reader.manifest.meta["numerics"]["threads"] == 1  # type: ignore[index]
    assert [e["kind"] for e in client.events(run) if e["kind"].startswith("numerics")] == ["numerics"]
    records = read_steps(Path(eventful.run_dir))
    assert len(records) == 300 and {r.world_size for r in records} == {1, 2, 3}
    calm = calm_run(job, eventful, tmp_path / "calm")
    ours, theirs = (
        [(r.loss, r.update.grad_norm, r.validation_loss, r.update.applied) for r in steps]
        for steps in (records, calm.records)
    )
    assert ours == theirs
    assert_same_tensors(eventful, calm)
