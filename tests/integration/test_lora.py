"""Runs that train low-rank adapters alone, by real workers: through rescales, a loss and a resume, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.hf.pretrained import resolved
from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.read import read_manifest
from orchestrator.protocol.messages import Restore
from orchestrator.spec.job import JobSpec
from tests.support.pretrained import write_weights
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of, disturbed_and_undisturbed

pytestmark = pytest.mark.usefixtures("device")

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _job(texts: Path, base: Path, lora: dict[str, Any], num_experts: int = 6, **train: Any) -> JobSpec:
    """A job of adapters on a pretrained model, which is written to `base` if it isn't there."""
    sizes = {"vocab_size": VOCAB, "partial_rotary_factor": 0.5, "n_routed_experts": num_experts}
    model = small_job(texts, sizes).model
    if not base.exists():
        write_weights(base, model)
    job = small_job(texts, {"init_from": str(base), "lora": lora, "n_routed_experts": num_experts}, lr=1e-2, **train)
    return job.model_copy(update={"model": resolved(job.model, base)})


@pytest.mark.parametrize(
    ("lora", "train"),
    [
        pytest.param(
            {"target_modules": EVERYWHERE, "r": 4},
            {"zero_stage": 2},
            id="everywhere",
            marks=pytest.mark.long_emulated,
        ),
        pytest.param(
            {"target_modules": EVERYWHERE},
            {"experts": 2},
            id="more workers than experts",
            marks=pytest.mark.long_emulated,
        ),
        pytest.param(
            {"lora_dropout": 0.2},
            {"precision": "bf16"},
            id="attention with dropout in bf16",
            marks=pytest.mark.long_emulated,
        ),
    ],
)
def test_adapters_move_and_are_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, lora: dict[str, Any], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    experts = train.pop("experts", 6)
    job = _job(texts, tmp_path / "base", lora, experts, determinism="exact", **train)
    groups = disturbed_and_undisturbed(job, store_dir, tmp_path)
    disturbed, undisturbed = ([(r.loss, r.update.grad_norm) for _, r in sorted(g.records.items())] for g in groups)
    assert len(undisturbed) == STEPS and disturbed == undisturbed
    assert undisturbed[-1][0] < undisturbed[0][0] - 0.2


@pytest.mark.long_emulated
def test_a_checkpoint_has_adapters_alone_and_any_world_goes_on_from_it(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    job = _job(texts, tmp_path / "base", {"target_modules": EVERYWHERE}, determinism="exact")
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": 10})})
    losses: list[dict[int, float]] = []
    restore = None
    for size in (3, 2):
        with LocalWorkerGroup(job, store_dir, tmp_path / str(size), size=size) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids, restore=restore))
            worker_group.await_finished()
        losses.append({step: record.loss for step, record in worker_group.records.items()})
        if restore is None:
            path = commit_of(worker_group, 9)
            params, buffers = listed(job.model, VOCAB)
            adapters = [param.name for param in params if ".lora." in param.name]
            wanted = {f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in adapters}
            assert read_manifest(path).tensors.keys() == wanted | {f"buffer/{name}" for name, _ in buffers}
            restore = Restore(9, str(path))
    assert sorted(losses[0]) == list(range(STEPS)) and sorted(losses[1]) == list(range(10, STEPS))
    assert all(losses[0][step] == loss for step, loss in losses[1].items())
