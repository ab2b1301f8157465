"""A user's model tried out before it is trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.hf.pretrained import resolved
from orchestrator.errors import EntrypointError
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.trial import dry_run
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.task import TaskSpec
from orchestrator.worker.check_user_code import fault_of
from tests.support import devices
from tests.support.own_models import ROOT, example, linear, own_spec

CPU = torch.device("cpu")


def rehearse(job: JobSpec, vocab_size: int, device: torch.device) -> None:
    dry_run.rehearse(job, vocab_size, task_of(job.task), device)


def _job(model: Any, precision: str = "fp32", isolated: bool = False, determinism: str = "fast") -> JobSpec:
    sizes = {"sequence_length": 16, "precision": precision, "determinism": determinism}
    data = {"vocab_size": 300, "isolate_documents": isolated}
    return JobSpec.model_validate({"schema": "v1", "name": "own", "model": model, "train": sizes, "data": data})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_examples_can_be_trained(name: str, precision: str) -> None:
    rehearse(_job(example(name), precision), 300, CPU)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
OF_TRANSFORMERS = {"model_type": "dots1", "vocab_size": 300, "n_shared_experts": 1, "first_k_dense_replace": 1}


@pytest.mark.parametrize("trained", ["documents", "pairs of answers", "a model of transformers"])
def test_passes_are_tried_on_the_device(device: str, tmp_path: Path, trained: str) -> None:
    if trained == "documents":
        job = _job(own_spec(tmp_path, linear(more=", documents_BT=None")), isolated=True)
    elif trained == "pairs of answers":
        job = _job(SIZES)
        job = job.model_copy(update={"task": TaskSpec.model_validate({"name": "dpo"})})
    else:
        spec = ModelSpec(impl="transformers", config=OF_TRANSFORMERS | SIZES | {"head_dim": 8})
        job = _job({}, isolated=True).model_copy(update={"model": resolved(spec)})
    rehearse(job, 300, devices.device())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": (
        {"forward": "return self.head(self.embedding(tokens).view(len(tokens), tokens.shape[1], -1))"},
        r"on no rows raised RuntimeError.*no part of the global batch left",
    ),
    "unused": ({"layers": "self.spare = nn.Linear(2, 2)"}, r"spare.weight, spare.bias of .* have no dense gradient"),
    "unused without rows": (
        {
            "layers": "self.spare = nn.Linear(spec.hidden_size, spec.hidden_size)",
            "forward": "x = self.embedding(tokens); return self.head(self.spare(x) if len(x) else x)",
        },
        r"spare.weight, spare.bias of .* after a pass on no rows",
    ),
    "raises": ({"forward": "return self.head(tokens)"}, r"on a row raised RuntimeError"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_fails_in_a_pass_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        rehearse(_job(own_spec(tmp_path, linear(**change))), 300, CPU)


CALLS = """
from orchestrator.model.task import Loss

class Task:
    def loss(self, model, batch):
        total = 0.0 * next(model.parameters()).sum()
        for _ in range({times}):
            total = total + model(batch["inputs"], batch["targets"])
        return Loss(total)

def task(options):
    return Task()
"""


@pytest.mark.parametrize(
    ("times", "which"),
    [
        ("2", "more than once"),
        ("1 + int(batch['inputs'].sum()) % 2", "more than once"),
        ("1 + (len(batch['inputs']) == 0)", "more than once"),
        ("len(batch['inputs']) > 0", "not at all"),
    ],
)
def test_a_task_calls_a_model_with_experts_once_whatever_the_data_are(tmp_path: Path, times: str, which: str) -> None:
    (tmp_path / "calls.py").write_text(CALLS.format(times=times))
    model = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    task = TaskSpec(entrypoint="calls:task", code_dir=str(tmp_path))
    sys.modules.pop("calls", None)
    job = _job(model | {"n_routed_experts": 4}).model_copy(update={"task": task})
    with pytest.raises(EntrypointError, match=f"calls a model with experts {which} in a pass.*for one without rows"):
        rehearse(job, 300, CPU)


def test_a_model_that_draws_random_numbers_is_refused_where_bits_count(tmp_path: Path) -> None:
    dropout = own_spec(tmp_path, linear(forward="return self.head(nn.functional.dropout(self.embedding(tokens)))"))
    rehearse(_job(dropout, determinism="exact"), 300, CPU)  # torch's own generator, which is seeded
    drawn = "torch.rand(1, generator=self.dice)"
    init, forward = "self.dice = torch.Generator()", f"return self.head(self.embedding(tokens) * {drawn})"
    model = own_spec(tmp_path, linear(init=init, forward=forward))
    rehearse(_job(model), 300, CPU)
    with pytest.raises(EntrypointError, match=r"head.weight.* have another gradient in a second pass.*determinism"):
        rehearse(_job(model, determinism="exact"), 300, CPU)
    rehearse(_job(example("moe"), determinism="exact"), 300, CPU)


RETURN = "return self.head(self.embedding(tokens))"
MEAN = "self.register_buffer('mean', torch.zeros(2), persistent={})"
TABLE = "self.register_buffer('table', torch.zeros(0), persistent=False)"
CHANGING: dict[str, tuple[dict[str, str], str]] = {
    "a buffer that is kept": (
        {"init": MEAN.format(True), "forward": f"self.mean += 1.0; {RETURN}"},
        "on a row changes buffers mean of Model; ",
    ),
    "a buffer that is not kept": (
        {"init": MEAN.format(False), "forward": f"self.mean += 1.0; {RETURN}"},
        "on .* changes buffers mean of Model; ",
    ),
    "without rows": (
        {"init": MEAN.format(True), "forward": f"self.mean += float(not len(tokens)); {RETURN}"},
        "on no rows changes buffers mean of Model; ",
    ),
    "BatchNorm": (
        {
            "layers": "self.norm = nn.BatchNorm1d(spec.hidden_size); self.norm.num_batches_tracked = None",
            "forward": "return self.head(self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2))",
        },
        "changes buffers norm.running_mean of BatchNorm1d, norm.running_var of BatchNorm1d; ",
    ),
}


@pytest.mark.parametrize("determinism", ["fast", "exact"])
@pytest.mark.parametrize(("change", "message"), CHANGING.values(), ids=CHANGING.keys())
def test_a_model_whose_pass_changes_a_buffer_is_refused(
    tmp_path: Path, change: dict[str, str], message: str, determinism: str
) -> None:
    with pytest.raises(EntrypointError, match=message) as caught:
        rehearse(_job(own_spec(tmp_path, linear(**change)), determinism=determinism), 300, CPU)
    assert "use LayerNorm or GroupNorm" in caught.value.remedy


MOE = "self.moe = MoELayer(spec, experts)"
CALLING: dict[str, tuple[str, str | None]] = {
    "twice": ("x = self.moe(self.moe(x))", r"on a row calls moe 2 times; a layer of experts is called once"),
    "not without rows": ("x = self.moe(x) if len(x) else x", "on no rows calls moe 0 times"),
    "recomputed": ("x = torch.utils.checkpoint.checkpoint(self.moe, x, use_reentrant=False)", None),
}


@pytest.mark.parametrize(("call", "message"), CALLING.values(), ids=CALLING.keys())
def test_a_layer_of_experts_is_called_once_in_a_pass(tmp_path: Path, call: str, message: str | None) -> None:
    job = _job(own_spec(tmp_path, linear(MOE, forward=f"x = self.embedding(tokens); {call}; return self.head(x)")))
    if message is None:
        rehearse(job, 300, CPU)
    else:
        with pytest.raises(EntrypointError, match=message):
            rehearse(job, 300, CPU)


def test_a_first_pass_may_make_a_table_that_is_not_kept(tmp_path: Path) -> None:
    forward = f"self.table = self.table if len(self.table) else torch.arange(tokens.shape[1]).float(); {RETURN}"
    rehearse(_job(own_spec(tmp_path, linear(init=TABLE, forward=forward))), 300, CPU)


def test_isolated_documents_need_a_model_that_takes_them(tmp_path: Path) -> None:
    fault = fault_of(_job(own_spec(tmp_path, linear()), isolated=True))
    assert fault is not None and "isolate_documents" in fault.message
    assert fault_of(_job(own_spec(tmp_path, linear(more=", documents_BT=None")), isolated=True)) is None


TAKES = """
from orchestrator.model.task import Loss

class Task:
    def loss(self, model, batch):
        inputs, targets, documents = batch["inputs"], batch["targets"], batch["documents"]
        return Loss({total})

def task(options):
    return Task()
"""


@pytest.mark.parametrize(
    ("total", "is_isolated"),
    [
        ("model(inputs, targets)", False),
        ("model.token_losses(inputs, targets).sum()", False),
        ("model(inputs, targets, documents)", True),
        ("model.token_losses(inputs, targets, documents_BT=documents).sum()", True),
    ],
)
def test_a_task_on_isolated_documents_passes_them_on(tmp_path: Path, total: str, is_isolated: bool) -> None:
    (tmp_path / "takes.py").write_text(TAKES.format(total=total))
    task = TaskSpec(entrypoint="takes:task", code_dir=str(tmp_path))
    sys.modules.pop("takes", None)
    job = _job(SIZES, isolated=True).model_copy(update={"task": task})
    if is_isolated:
        rehearse(job, 300, CPU)
    else:
        with pytest.raises(EntrypointError, match="the loss of task.entrypoint takes:task depends on a document"):
            rehearse(job, 300, CPU)


def test_the_command_answers_with_json_alone_whatever_the_code_prints(tmp_path: Path) -> None:
    spec = own_spec(tmp_path, "print('hello')\ndef build(*a):\n    raise ValueError('sizes')\n")
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.worker.check_user_code"],
        input=_job(spec).model_dump_json(by_alias=True),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    fault = json.loads(done.stdout)
    assert fault["message"].endswith("raised ValueError: sizes") and "in build" in fault["traceback"]
    assert "hello" in done.stderr
