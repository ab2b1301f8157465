"""Runs of which parts are compiled, by real workers: through rescales, a loss and a resume, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.job import JobSpec
from tests.support.texts import STEPS, VOCAB, small_job
from tests.support.worker_group import disturbed_and_undisturbed

COMPILES_NOTHING = """
import sys, torch
from torch._C._distributed_c10d import HashStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect, disconnect
from orchestrator.model.factory import build_model, single_rank
from orchestrator.spec.job import JobSpec
from orchestrator.worker.transition.warmup import use_compiler, warm_up

job, cpu = JobSpec.model_validate_json(sys.argv[1]), torch.device("cpu")
print(use_compiler(job, cpu))
warm_up(job, 300, cpu, "127.0.0.1")
torch.compiler.set_stance("fail_on_recompile")
placement = ExpertPlacement.balanced(job.model.n_routed_experts, 1)
groups = connect(HashStore(), "all", 0, placement, "gloo", address="127.0.0.1")
model = build_model(job.model, 300, single_rank(job.model))
model.init_weights(0)
engine = DeepSpeedEngineAdapter(model, job.train, groups, cpu, job.communication)
engine.on_weights_initialized()
has_lengths = job.data.row_format == "documents"

def batch(rows, length):
    tokens_BU = torch.randint(0, 300, (rows, length + 1))
    found = {"inputs": tokens_BU[:, :-1], "targets": tokens_BU[:, 1:]}
    return found | ({"lengths": torch.tensor([length, 5, 7, 3][:rows], dtype=torch.int64)} if has_lengths else {})

sizes = [(2, 32), (2, 32), (1, 32)] + [(4, 20), (1, 9)] * (not job.train.micro_batch_rows)
for rows, length in sizes:
    engine.accumulate(batch(rows, length), 99, last=True)
    engine.step(0.1)
engine.accumulate(batch(0, 32), 99, last=True)  # of a rank without a micro-batch
engine.step(0.1)
for rows, length in ((2, 32), (1, 32), (0, 32)):
    engine.evaluate(batch(rows, length))
torch.compiler.set_stance("default")
print("ok")
"""

pytestmark = pytest.mark.timeout(1200)  # the first of a machine compiles


def _job(texts: Path, model: dict[str, Any], **train: Any) -> JobSpec:
    return small_job(texts, {"vocab_size": VOCAB, **model}, lr=1e-2, determinism="exact", torch_compile=True, **train)


@pytest.mark.parametrize(
    ("model", "train"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param(
            {"gradient_checkpointing": "selective"},
            {"precision": "bf16", "zero_stage": 2},
            id="bf16, recomputed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_moves_and_is_replayed_bit_by_bit(
    texts: Path, store_dir: Path, tmp_path: Path, model: dict[str, Any], train: dict[str, Any]
) -> None:
    """A rescale, a lost worker, and a rescale to one, against a world of one that nothing happens to."""
    disturbed, undisturbed = disturbed_and_undisturbed(_job(texts, model, **train), store_dir, tmp_path)
    assert len(undisturbed.records) == STEPS
    for step, record in undisturbed.records.items():
        other = disturbed.records[step]
        assert (other.loss, other.update, other.validation_loss) == (record.loss, record.update, record.validation_loss)
    assert undisturbed.records[STEPS - 1].loss < undisturbed.records[0].loss - 0.2


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"train": {"determinism": "exact", "micro_batch_size": 2}}, id="equal rows"),
        pytest.param(
            {"train": {"micro_batch_size": "64 tokens"}, "data": {"row_format": "documents"}},
            id="documents",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_is_compiled_after_the_warm_up(changes: dict[str, Any]) -> None:
    """Of a model with more layers and experts than the warm-up's, as one that a rescale builds."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "first_k_dense_replace": 2, "n_routed_experts": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 32}
    keys = {"name": "warm", "model": sizes | heads, **changes}
    keys["train"] = {"torch_compile": True, "sequence_length": 32, "global_batch_size": 8, **changes["train"]}
    job = JobSpec.model_validate(keys)
    command = [sys.executable, "-c", COMPILES_NOTHING, job.model_dump_json()]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "ok", done.stderr[-3000:]
