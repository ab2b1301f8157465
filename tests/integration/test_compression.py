"""Compressed gradients on real gloo ranks: nothing is lost, whatever isn't sent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import Sharing
from orchestrator.policy.estimate.compression_choice import CANDIDATES
from orchestrator.protocol.messages import GenerationPlan
from orchestrator.protocol.worker_report import Handover
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.job import JobSpec
from orchestrator.worker.shard.compression_tuner import PROBES, SKIPPED
from tests.support import small
from tests.support.ranks import Ranks
from tests.support.texts import STEPS, small_job
from tests.support.worker_group import LocalWorkerGroup

LOSSY: list[dict[str, Any]] = [
    {"scheme": "bf16", "error_feedback": True},
    {"scheme": "fp16", "error_feedback": True},
    {"scheme": "int8", "error_feedback": True},
    {"scheme": "int4"},
    {"scheme": "topk", "share": 0.1},
    {"scheme": "topk", "share": 0.1, "momentum": 0.9},
    {"scheme": "powersgd", "share": 0.2},
]
IDS = [" ".join(str(value) for value in compression.values()) for compression in LOSSY]


def _kept(engine: Any, kind: str) -> Tensor:
    """What all ranks together have kept, by the parameters' order."""
    parts = [held.data for name, held in sorted(engine.ranges(), key=lambda r: r[0]) if name.startswith(f"{kind}/")]
    kept = torch.cat(parts).double()
    dist.all_reduce(kept)
    return kept


def _adding(total: Tensor) -> Callable[[Tensor], None]:
    def add(grad: Tensor) -> None:
        total.add_(grad)

    return add


def _account(
    rank: int, world_size: int, store: Store, prefix: str, compression: dict[str, Any], stage: int
) -> tuple[float, float, bool]:
    """How far residuals and sums are from what was to be summed, over its norm, at most; the residual's share of it;
    and whether a step that isn't finite leaves everything as it was."""
    placement = ExpertPlacement.balanced(4, world_size)
    train = small.train_spec("fp32", stage, betas=(0.0, 0.95) if compression.get("momentum") else (0.9, 0.95))
    _, model, engine = small.build(
        "deepspeed", store, prefix, rank, placement, train, bucket_mb=0.02, compression=compression
    )
    gradients = engine._gradients  # type: ignore[attr-defined]
    named = [n for n, _ in model.named_parameters() if f"residual/{n}" in engine.ranges().names()]
    assert named and not any("router" in n or "norm" in n or ".experts." in n for n in named)
    worst, share = 0.0, 0.0
    for step in range(4):
        before = _kept(engine, "residual")
        seen = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n in named}
        hooks = [p.register_hook(_adding(seen[n])) for n, p in model.named_parameters() if n in named]
        small_micro_batches = range(rank, small.NUM_SLOTS, world_size)
        for number in small_micro_batches:
            engine.accumulate(small.micro_batch(step, number), 384, number + world_size >= small.NUM_SLOTS)
        sums = gradients.sums()
        for hook in hooks:
            hook.remove()
        if not compression.get("momentum"):
            whole = dict(zip(named, _whole(gradients, sums, model, named), strict=True))
            given = torch.cat([seen[n].flatten() for n in sorted(named)]).double()
            dist.all_reduce(given)
            gradients.settle(True)
            after = _kept(engine, "residual")
            sent = torch.cat([whole[n] for n in sorted(named)]).double()
            worst = max(worst, float((before + given - sent - after).norm() / given.norm()))
            share = float(after.norm() / given.norm())
        else:
            gradients.settle(True)
            share = float(_kept(engine, "velocity").norm())
    unchanged = [(name, r.data.clone()) for name, r in engine.ranges()]
    if rank == 0:
        model.head.register_hook(lambda grad: grad * float("nan"))
    engine.accumulate(small.micro_batch(9, rank), 384, last=True)
    applied = engine.step(1e-3).applied
    same = all(torch.equal(old, held.data) for (_, old), (_, held) in zip(unchanged, engine.ranges(), strict=True))
    engine.close()
    return worst, share, same and not applied


def _whole(gradients: Any, sums: list[Tensor], model: Any, named: list[str]) -> list[Tensor]:
    """The sums of these parameters, from all ranks' pieces."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for bucket, piece in zip(gradients._buckets, sums, strict=True):
        pieces = [torch.zeros_like(piece) for _ in range(dist.get_world_size())]
        if bucket.residual is not None:
            dist.all_gather(pieces, piece)
            flat = torch.cat(pieces)
            found |= {names[id(param)]: flat[span] for param, span in bucket.spans()}
    return [found[name] for name in named]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("compression", LOSSY, ids=IDS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_sent_values_and_residuals_add_up_to_the_gradients(
    ranks: Ranks, world_size: int, compression: dict[str, Any], stage: int
) -> None:
    if stage == 2 and compression.get("momentum"):
        pytest.skip("momentum is gathered once per step: ZeRO 1 only")
    for worst, share, unharmed in ranks.run(_account, world_size, compression, stage):
        assert worst < 1e-6
        assert unharmed
        assert (share > 1e-6) == (world_size > 1 or bool(compression.get("momentum")))


def _losses(
    rank: int, world_size: int, store: Store, prefix: str, compression: str | dict[str, Any], steps: int
) -> list[float]:
    placement = ExpertPlacement.balanced(4, world_size)
    groups, _, engine = small.build(
        "deepspeed", store, prefix, rank, placement, small.train_spec(), compression=compression
    )
    losses = small.train_steps(engine, groups, range(steps))
    engine.close()
    return losses


@pytest.mark.long_emulated
def test_training_is_nearly_that_without_compression(ranks: Ranks) -> None:
    plain = ranks.run(_losses, 3, "none", 20)[0]
    for compression in ("bf16", "fp16", "int8"):
        assert ranks.run(_losses, 3, compression, 20)[0] == pytest.approx(plain, rel=0.01)
    for compression in LOSSY[3:5] + LOSSY[6:]:
        losses = ranks.run(_losses, 3, compression, 20)[0]
        assert losses[-1] - plain[-1] < 0.1 * (plain[0] - plain[-1])


def _held(rank: int, world_size: int, store: Store, prefix: str, compression: dict[str, Any]) -> list[Any]:
    placement = ExpertPlacement.balanced(4, world_size)
    _, _, engine = small.build(
        "deepspeed", store, prefix, rank, placement, small.train_spec(), compression=compression, bucket_mb=0.02
    )
    found = [(name, r.start, r.stop) for name, r in engine.ranges()]
    engine.close()
    return sorted(found)


@pytest.mark.parametrize("compression", LOSSY[3:], ids=IDS[3:])
def test_the_engine_holds_the_ranges_of_the_layout(ranks: Ranks, compression: dict[str, Any]) -> None:
    layout = small.layout_of(ExpertPlacement.balanced(4, 3), "fp32", compression=compression, bucket_mb=0.02)
    assert Sharing.PARTIAL in layout.sharing
    for rank, spans in enumerate(ranks.run(_held, 3, compression)):
        wanted = [(layout.names[t], start, stop) for t, start, stop in layout.ranges_of(f"w{rank}").tolist()]
        assert spans == sorted(wanted)


KEPT: list[dict[str, Any]] = [{"scheme": "topk", "share": 0.1}, {"scheme": "powersgd", "share": 0.1}]


@pytest.fixture(params=[KEPT[0], pytest.param(KEPT[1], marks=pytest.mark.long_emulated)], ids=["topk", "powersgd"])
def job(request: pytest.FixtureRequest, texts: Path) -> JobSpec:
    communication = CommunicationSpec.model_validate({"compression": request.param, "bucket_mb": 0.05})
    return small_job(texts).model_copy(update={"communication": communication})


def _handovers(worker_group: LocalWorkerGroup, plan: GenerationPlan) -> list[Handover]:
    reports = [worker_group.members[worker].report() for worker in worker_group.living]
    return [h for report in reports for h in report.transition.handovers if h.generation == plan.generation]


@pytest.mark.usefixtures("device")
def test_unsent_residuals_survive_rescales(job: JobSpec, store_dir: Path, tmp_path: Path) -> None:
    with LocalWorkerGroup(job, store_dir, tmp_path, size=4) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        for members in (worker_group.ids[:2], worker_group.ids[1:4], [worker_group.ids[3]], worker_group.ids[:2]):
            worker_group.await_step(worker_group.newest_step + 3)
            plan = worker_group.rescale(members)
            handovers = _handovers(worker_group, plan)
            assert len(handovers) == len(plan.involved) and all(h.state_identical for h in handovers)
            assert max(h.residual_error for h in handovers) < 1e-6
        worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert worker_group.records[STEPS - 1].loss < worker_group.records[0].loss - 0.5


@pytest.mark.usefixtures("device")
def test_unsent_residuals_of_a_dead_worker_are_with_its_buddy(job: JobSpec, store_dir: Path, tmp_path: Path) -> None:
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_step(6)
        worker_group.members[worker_group.ids[1]].kill()
        plan = worker_group.recover([worker_group.ids[0], worker_group.ids[2]])
        handovers = _handovers(worker_group, plan)
        assert handovers and all(h.state_identical for h in handovers)
        assert max(h.residual_error for h in handovers) < 1e-6
        worker_group.await_finished()
    assert sorted(worker_group.records) == list(range(STEPS))
    assert worker_group.records[STEPS - 1].loss < worker_group.records[0].loss - 0.5


@pytest.mark.usefixtures("device")
def test_auto_chooses_the_same_scheme_on_all_ranks_and_again_in_each_world(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    communication = CommunicationSpec.model_validate({"compression": "auto", "bucket_mb": 0.05})
    job = small_job(texts).model_copy(update={"communication": communication})
    with LocalWorkerGroup(job, store_dir, tmp_path, size=3) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids[:2]))
        worker_group.await_step(12)
        plan = worker_group.rescale(worker_group.ids)
        assert all(h.state_identical for h in _handovers(worker_group, plan))
        worker_group.await_finished()
    records = [record for _, record in sorted(worker_group.records.items())]
    assert len(records) == STEPS and all(record.update.applied for record in records)
    for generation in (0, plan.generation):
        schemes = [record.communication.compression for record in records if record.generation == generation]
        assert schemes[: SKIPPED + PROBES] == ["none"] * (SKIPPED + PROBES)
        assert len(set(schemes[SKIPPED + PROBES :])) == 1 and schemes[-1] in CANDIDATES
    assert records[-1].loss < records[0].loss - 0.5
