"""Runs that train low-rank adapters alone, by real workers: through rescales, a loss and a resume, bit by bit."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.hf.pretrained import resolved
from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.shard_file import read_shards
from orchestrator.checkpoint.write import commit
from orchestrator.protocol.messages import Restore
from orchestrator.spec.job import JobSpec
from tests.support.pretrained import write_weights
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup

pytestmark = pytest.mark.usefixtures("device")

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _job(texts: Path, base: Path, lora: dict[str, Any], **train: Any) -> JobSpec:
    """A job of adapters on a pretrained model, which is written to `base` if it isn't there."""
    model = small_job(texts, {"vocab_size": VOCAB, "partial_rotary_factor": 0.5}).model
    if not base.exists():
        write_weights(base, model)
    job = small_job(texts, {"init_from": str(base), "lora": lora}, lr=1e-2, **train)
    return job.model_copy(update={"model": resolved(job.model, base)})


def _handovers(worker_group: LocalWorkerGroup, generation: int) -> list[Any]:
    reports = [worker_group.members[w].report() for w in worker_group.ids if worker_group.members[w].process.is_alive()]
    return [h for r in reports for h in r.transition.handovers if h.generation == generation]


@pytest.mark.parametrize(
    ("lora", "train"),
    [
        pytest.param({"target_modules": EVERYWHERE, "r": 4}, {"zero_stage": 2}, id="everywhere"),
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
    job = _job(texts, tmp_path / "base", lora, determinism="exact", **train)
    runs = []
    for is_disturbed in (False, True):
        with LocalWorkerGroup(job, store_dir, tmp_path / str(is_disturbed), size=3) as worker_group:
            ids = worker_group.ids
            worker_group.start(worker_group.plan(ids[:2] if is_disturbed else ids[:1]))
            if is_disturbed:
                worker_group.await_step(worker_group.newest_step + 3)
                worker_group.rescale(ids)
                worker_group.await_step(worker_group.newest_step + 4)
                worker_group.members[ids[2]].kill()
                worker_group.recover(ids[:2])
                worker_group.await_step(worker_group.newest_step + 3)
                plan = worker_group.rescale(ids[1:2])
                assert all(h.state_identical for h in _handovers(worker_group, plan.generation))
            worker_group.await_finished()
        runs.append([(r.loss, r.update.grad_norm) for _, r in sorted(worker_group.records.items())])
    assert len(runs[0]) == STEPS and runs[0] == runs[1]
    assert runs[0][-1][0] < runs[0][0][0] - 0.2


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
            members = list(worker_group.ids)
        losses.append({step: record.loss for step, record in worker_group.records.items()})
        if restore is None:
            directory = Path(worker_group.job.storage_dir) / "checkpoints"
            shards = [next(s for s in worker_group.final[w].shards if s.step == 9) for w in members]
            params, buffers = listed(job.model, VOCAB)
            adapters = [param for param in params if ".lora." in param.name]
            wanted = {f"{kind}/{p.name}": p.shape for p in adapters for kind in ("master", "exp_avg", "exp_avg_sq")}
            wanted |= {f"buffer/{name}": shape for name, shape in buffers}
            written = read_shards(directory, shards, term=1)
            path = commit(directory, manifest_of(written, run_id="test", term=1, shapes=wanted))
            restore = Restore(9, str(path))
    assert sorted(losses[0]) == list(range(STEPS)) and sorted(losses[1]) == list(range(10, STEPS))
    assert all(losses[0][step] == loss for step, loss in losses[1].items())
