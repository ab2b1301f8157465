"""Runs that train for integers, by real workers: through rescales, a loss and a resume, bit by bit; and their export,
as other libraries read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.checkpoint.hf.tensor_listing import list_tensors
from orchestrator.data.store import TokenStore
from orchestrator.errors import UsageError
from orchestrator.inference.load_model import load_model
from orchestrator.spec.job import JobSpec
from orchestrator.submission.model_process import export_model
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of, disturbed_and_undisturbed

pytestmark = pytest.mark.usefixtures("device")

INT4 = {"weight_dtype": "int4", "group_size": 32}


def _job(
    texts: Path, quantization: dict[str, Any] | None, model: dict[str, Any] | None = None, **train: Any
) -> JobSpec:
    sizes = {"vocab_size": VOCAB, "n_shared_experts": 1, **(model or {})}
    return small_job(texts, sizes, lr=1e-2, determinism="exact", quantization=quantization, **train)


@pytest.mark.parametrize(
    ("quantization", "train"),
    [
        pytest.param(INT4, {"ema": {"decay": 0.9}}, id="int4 with an average", marks=pytest.mark.long_emulated),
        pytest.param({}, {"precision": "bf16", "zero_stage": 2}, id="int8 in bf16", marks=pytest.mark.long_emulated),
        pytest.param(
            INT4,
            {"pruning": {"targets": [{"pattern": "2:4"}], "start_step": 2, "end_step": 24, "every": 3}},
            id="int4 with 2 of 4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_moves_and_is_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, quantization: dict[str, Any], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    job = _job(texts, quantization, **train)
    disturbed, undisturbed = disturbed_and_undisturbed(job, store_dir, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        other = disturbed.records[step]
        assert (other.loss, other.update) == (record.loss, record.update)
    assert undisturbed.records[STEPS - 1].loss < undisturbed.records[0].loss - 0.2


@pytest.mark.on_cpu
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_others_read_the_export_and_compute_the_same(texts: Path, store_dir: Path, tmp_path: Path, dtype: str) -> None:
    """Of a run that was trained for it: all its matrices are smaller, and the logits those of its own integers."""
    job = _job(texts, INT4 if dtype == "int4" else {})
    with LocalWorkerGroup(job, store_dir, tmp_path / "run", size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    checkpoint = commit_of(worker_group, STEPS - 1)
    run_dir = checkpoint.parent.parent
    (run_dir / "job.json").write_text(job.model_dump_json(by_alias=True))
    TokenStore.open(store_dir).tokenizer().save(run_dir / "tokenizer.json")
    num_bytes = export_model(run_dir, job, checkpoint, tmp_path / dtype, dtype)
    whole = export_model(run_dir, job, checkpoint, tmp_path / "fp32", "fp32")
    assert num_bytes < 0.4 * whole  # rows are short: scales weigh much
    section = json.loads((tmp_path / dtype / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    listing = list_tensors(tmp_path / dtype)
    assert not [name for name in listing.shapes if "mlp.gate.weight_" in name or "norm.weight_" in name]

    cpu = torch.device("cpu")
    ours = load_model(checkpoint, job, VOCAB, device=cpu, precision=dtype)
    rounding = load_model(checkpoint, job, VOCAB, device=cpu)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, attn_implementation="eager")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (2, 24)))
    with torch.no_grad():
        found, near, wanted = ours(tokens), rounding(tokens), theirs(tokens).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert float((found - near).norm() / near.norm()) < 0.05
    with pytest.raises(UsageError, match="was trained for"):
        export_model(run_dir, job, checkpoint, tmp_path / "other", "int8" if dtype == "int4" else "int4")
    assert not (tmp_path / "other").exists()
