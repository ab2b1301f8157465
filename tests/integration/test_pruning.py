"""Runs that prune, by real workers: through rescales, a loss and a resume, bit by bit; and what is left of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.data.store import TokenStore
from orchestrator.inference.load_model import load_model
from orchestrator.protocol.messages import Restore
from orchestrator.spec.job import JobSpec
from orchestrator.submission.model_process import export_model
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of, disturbed_and_undisturbed

pytestmark = pytest.mark.usefixtures("device")

STRUCTURED = [{"pattern": "neurons", "sparsity": 0.5}, {"pattern": "heads", "sparsity": 0.5}]
BY_ELEMENT = [
    {"pattern": "2:4", "params": ["*.experts.*"]},
    {"pattern": "unstructured", "sparsity": 0.7},
]


def _job(texts: Path, targets: list[dict[str, Any]], num_experts: int = 6, **train: Any) -> JobSpec:
    pruning = {"targets": targets, "start_step": 2, "end_step": 24, "every": 3}
    sizes = {"vocab_size": VOCAB, "n_routed_experts": num_experts, "n_shared_experts": 2}
    return small_job(texts, sizes, lr=1e-2, determinism="exact", pruning=pruning, **train)


@pytest.mark.parametrize(
    ("targets", "train"),
    [
        pytest.param(STRUCTURED, {"ema": {"decay": 0.9}}, id="neurons and heads with an average"),
        pytest.param(
            STRUCTURED,
            {"zero_stage": 2, "precision": "bf16", "experts": 2},
            id="in bf16, with more workers than experts",
            marks=pytest.mark.slow,
        ),
        pytest.param(BY_ELEMENT, {"precision": "bf16"}, id="weights in bf16", marks=pytest.mark.long_emulated),
        pytest.param(BY_ELEMENT, {"optimizer": {"name": "muon"}}, id="weights with muon", marks=pytest.mark.slow),
    ],
)
def test_a_pruned_run_moves_and_is_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, targets: list[dict[str, Any]], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    job = _job(texts, targets, train.pop("experts", 6), **train)
    disturbed, undisturbed = disturbed_and_undisturbed(job, store_dir, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        other = disturbed.records[step]
        assert (other.loss, other.update) == (record.loss, record.update)
    shares = [record.update.sparsity for _, record in sorted(undisturbed.records.items())]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[10] > 0.2
    assert undisturbed.records[STEPS - 1].loss < undisturbed.records[0].loss - 0.2


@pytest.mark.long_emulated
def test_a_checkpoint_has_the_pattern_and_any_world_goes_on_from_it(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    job = _job(texts, BY_ELEMENT)
    job = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"every": 10})})
    runs: list[LocalWorkerGroup] = []
    restore = None
    for size in (3, 2):
        with LocalWorkerGroup(job, store_dir, tmp_path / str(size), size=size) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids, restore=restore))
            worker_group.await_finished()
        runs.append(worker_group)
        restore = restore or Restore(9, str(commit_of(worker_group, 9)))
    whole, resumed = (worker_group.records for worker_group in runs)
    assert sorted(resumed) == list(range(10, STEPS))
    assert all((whole[step].loss, whole[step].update) == (r.loss, r.update) for step, r in resumed.items())

    params, _ = listed(job.model, VOCAB)
    num_zeros = num_pruned = 0
    with CheckpointReader(commit_of(runs[0], STEPS - 1)) as reader:
        for param in (each.with_settings(job.train) for each in params):
            zeros = reader.read(f"master/{param.name}", 0, param.numel) == 0
            if not param.is_pruned:
                assert not zeros.any(), param.name
                continue
            num_zeros, num_pruned = num_zeros + int(zeros.sum()), num_pruned + param.numel
            if param.expert is not None:
                assert (zeros.reshape(-1, 4).sum(1) == 2).all(), param.name
            else:
                assert zeros.sum() == int(0.7 * param.numel), param.name
    assert whole[STEPS - 1].update.sparsity == num_zeros / num_pruned


@pytest.mark.long_emulated
def test_a_model_without_its_pruned_units_is_smaller_and_computes_the_same(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    job = _job(texts, STRUCTURED)
    with LocalWorkerGroup(job, store_dir, tmp_path / "run", size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    checkpoint = commit_of(worker_group, STEPS - 1)
    of_all = job.model_copy(update={"train": job.train.model_copy(update={"pruning": None})})
    cpu = torch.device("cpu")
    whole, smaller = (load_model(checkpoint, each, VOCAB, device=cpu) for each in (of_all, job))
    sizes = {"intermediate_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    assert {key: getattr(smaller.spec, key) for key in sizes} == sizes and smaller.spec.head_dim == job.model.head_dim
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(smaller(tokens), whole(tokens), rtol=1e-4, atol=1e-5)
    assert not any(int((param == 0).sum()) for param in smaller.parameters())

    run_dir = checkpoint.parent.parent
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    TokenStore.open(store_dir).tokenizer().save(run_dir / "tokenizer.json")
    export_model(run_dir, job, checkpoint, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert theirs.config.moe_intermediate_size == 16 and theirs.config.num_attention_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=tokens).logits, smaller(tokens), rtol=1e-4, atol=1e-4)
