"""Losses of tasks against their formulas, and what a task of a user's may not do."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orchestrator.errors import EntrypointError
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.model.task import Batch, Loss
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.tasks.chats import ChatModeling
from orchestrator.model.tasks.classification import Classification
from orchestrator.model.tasks.preference import DirectPreference, log_probabilities
from orchestrator.model.trial.dry_run import rehearse
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from tests.support import devices
from tests.support.tasks import task_job

pytestmark = pytest.mark.usefixtures("device")

VOCAB = 64
SPEC = ModelSpec(
    hidden_size=32, num_hidden_layers=2, n_routed_experts=4, moe_intermediate_size=16, intermediate_size=48
)
RNG = np.random.default_rng(0)


def _model(seed: int = 0) -> Any:
    with devices.device():
        model = build_model(SPEC, VOCAB, single_rank(SPEC))
    model.init_weights(seed)
    return model


def _answers(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    rows = []
    for _ in range(count):
        row: dict[str, Any] = {}
        for kind in ("chosen", "rejected"):
            tokens = draw.integers(0, VOCAB, draw.integers(5, 12)).astype(np.int32)
            row[f"{kind}_inputs"] = tokens[:-1]
            row[f"{kind}_targets"] = np.where(np.arange(len(tokens) - 1) < 2, IGNORED, tokens[1:]).astype(np.int32)
            row[f"reference_{kind}"] = np.float64(draw.normal(-20, 2))
        rows.append(row)
    return rows


def _tensors(arrays: Any) -> Batch:
    return {name: torch.from_numpy(array).to(devices.device()) for name, array in arrays.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_pairs_is_the_papers_formula(smoothing: float) -> None:
    """In fp64, from log-probabilities that are taken row by row, without padding."""
    model, rows, task = _model(), _answers(5), DirectPreference(0.3, smoothing)
    loss = task.loss(model, _tensors(task.collate(rows, RNG)))
    total, rights, margins = 0.0, 0, 0.0
    for row in rows:
        scores = {}
        for kind in ("chosen", "rejected"):
            inputs = torch.from_numpy(row[f"{kind}_inputs"].astype(np.int64))[None].to(devices.device())
            targets = torch.from_numpy(row[f"{kind}_targets"].astype(np.int64)).to(devices.device())
            logits = model(inputs)[0].double().log_softmax(-1)
            said = targets != IGNORED
            scores[kind] = float(logits[said].gather(1, targets[said][:, None]).sum()) - float(row[f"reference_{kind}"])
        margin = 0.3 * (scores["chosen"] - scores["rejected"])
        total += (1 - smoothing) * math.log1p(math.exp(-margin)) + smoothing * math.log1p(math.exp(margin))
        rights, margins = rights + (margin > 0), margins + margin
    assert float(loss.total) == pytest.approx(total, rel=1e-5) and loss.units == 5
    assert float(loss.metrics["accuracy"][0]) == rights and float(loss.metrics["accuracy"][1]) == 5
    assert float(loss.metrics["margin"][0]) == pytest.approx(margins, rel=1e-4)


def test_pairs_that_nothing_has_changed_for_have_the_loss_of_a_coin() -> None:
    model, rows, task = _model(), _answers(4), DirectPreference(0.1)
    batch = _tensors(task.collate(rows, RNG))
    with torch.no_grad():
        reference = log_probabilities(model, batch)
    assert float(task.loss(model, {**batch, "reference": reference}).total) == pytest.approx(4 * math.log(2), rel=1e-6)


def test_gradients_of_padded_answers_are_those_of_each_alone() -> None:
    rows, task = _answers(3), DirectPreference(0.3)
    together, alone = _model(), _model()
    task.loss(together, _tensors(task.collate(rows, RNG))).total.backward()
    for row in rows:
        task.loss(alone, _tensors(task.collate([row], RNG))).total.backward()
    for (name, one), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_chats_are_padded_and_their_loss_is_that_of_each_alone() -> None:
    model, task = _model(), ChatModeling()
    rows = [{"inputs": r["chosen_inputs"], "targets": r["chosen_targets"]} for r in _answers(4)]
    arrays = task.collate(rows, RNG)
    assert arrays["lengths"].tolist() == [len(row["inputs"]) for row in rows]
    together = float(task.loss(model, _tensors(arrays)).total)
    alone = sum(float(task.loss(model, _tensors(task.collate([row], RNG))).total) for row in rows)
    assert together == pytest.approx(alone, rel=1e-5)


def test_classes_have_their_cross_entropy() -> None:
    class Model:
        spec = SPEC
        weight = torch.nn.Parameter(torch.ones(1))

        def parameters(self) -> Any:
            return iter([self.weight])

        def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.flatten(1)[:, :3]

    task = Classification("pixels", "digit")
    rows = [{"pixels": np.array([[n, 2.0], [0.5, n]]), "digit": np.int64(n)} for n in range(3)]
    arrays = task.collate(rows, RNG)
    assert arrays["inputs"].dtype == np.float32
    loss = task.loss(Model(), {name: torch.from_numpy(a) for name, a in arrays.items()})  # type: ignore[arg-type]
    logits = torch.tensor([[n, 2.0, 0.5] for n in range(3)])
    wanted = F.cross_entropy(logits, torch.arange(3), reduction="sum")
    assert float(loss.total) == pytest.approx(float(wanted)) and loss.units == 3
    assert task.report({"accuracy": float(loss.metrics["accuracy"][0] / loss.metrics["accuracy"][1])}) == {
        "accuracy": pytest.approx(1 / 3)
    }


# -- a user's ----------------------------------------------------------------------------------------------------------

TASK = """
import random
import numpy as np
import torch
from torch import nn
from orchestrator.model.task import Loss

class Model(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x)[:, 0]

def build(spec, vocab_size, experts):
    return Model(spec)

class Task:
    metrics = ("error",)
    def loss(self, model, batch):
        error = (model.outputs(batch["x"]) - batch["y"]).square()
        metrics = {{"error": (error.sum(), torch.tensor(float(len(error))))}}
        {body}

def task(options):
    return {made}

def rows(split, options):
    return [{{"x": np.full(4, n, np.float32), "y": np.float32(n)}} for n in range(40)]
"""
SUM = "return Loss(error.sum(), len(error), metrics)"
BAD: dict[str, tuple[str, str, str]] = {
    "a mean": ("return Loss(error.mean() if len(error) else error.sum(), len(error), metrics)", "Task()", "is a mean"),
    "other units": ("return Loss(error.sum(), 2 * len(error), metrics)", "Task()", r"over 2 units; the data have 1"),
    "no units": ("return Loss(error.sum(), None, metrics)", "Task()", "over None units"),
    "nan": ("return Loss(error.sum() * float('nan'), len(error), metrics)", "Task()", "on a row is nan"),
    "a tensor": ("return error.sum()", "Task()", "returned a Tensor as loss"),
    "no scalar": ("return Loss(error, len(error), metrics)", "Task()", "total that is no scalar"),
    "metrics by mood": (
        "return Loss(error.sum(), len(error))",
        "Task()",
        "returned the metrics none; `metrics` names error",
    ),
    "another generator": (
        "return Loss(error.sum() * (1 + random.random()), len(error), metrics)",
        "Task()",
        "another gradient in a second pass .* so it matters which rank runs it",
    ),
    "as many calls as rows": (
        "[model.outputs(row[None]) for row in batch['x']]; return Loss(error.sum(), len(error), metrics)",
        "Task()",
        "calls the model 2 times on a row and 3 times on 2 rows",
    ),
    "metrics that are none": (
        "return Loss(error.sum(), len(error), {'error': 3.0})",
        "Task()",
        "returned error as float",
    ),
    "metrics of many": (
        "return Loss(error.sum(), len(error), {'error': (error, 1)})",
        "Task()",
        "returned error that is no scalar",
    ),
    "calls by the number of rows": (
        "[model.outputs(batch['x']) for _ in range(max(1, len(error)))]; return Loss(error.sum(), len(error), metrics)",
        "Task()",
        "calls the model 2 times on a row and 3 times on 2 rows",
    ),
    "more calls without rows": (
        "[model.outputs(batch['x']) for _ in range(3 if not len(error) else 1)]; "
        "return Loss(error.sum(), len(error), metrics)",
        "Task()",
        "calls the model 2 times on a row and 4 times on no rows",
    ),
    "a total in half precision": (
        "return Loss(error.sum().bfloat16(), len(error), metrics)",
        "Task()",
        "returned a total of bfloat16; sums must be float32",
    ),
    "a metric in half precision": (
        "return Loss(error.sum(), len(error), {'error': (error.sum(), error.half().sum())})",
        "Task()",
        "returned error of float16; sums must be float32",
    ),
    "metrics by one text": (SUM, "type('Named', (Task,), {'metrics': ('error')})()", "has the metrics 'error'"),
    "no task": (SUM, "42", "returned a int without a method loss"),
    "raises": ("return Loss(error.total(), len(error), metrics)", "Task()", "raised AttributeError"),
    "fails on no rows": (
        "return Loss(error[0] * len(error), len(error), metrics)",
        "Task()",
        "out of bounds.*no part of the global batch left",
    ),
}


ON_CHATS = """
from orchestrator.model.task import Loss

class Task:
    needs_reference = True

    def loss(self, model, batch):
        total = model.token_losses(batch["inputs"], batch["targets"], batch["lengths"]).sum(-1)
        total = total if "reference" not in batch else (total - batch["reference"]).view(2, -1).sum(0)
        return Loss(total.sum(), {units})

def task(options):
    return Task()
"""


def _own(folder: Path, body: str, made: str = "Task()") -> JobSpec:
    module = f"task_{abs(hash((body, made)))}"
    (folder / f"{module}.py").write_text(TASK.format(body=body, made=made))
    job = task_job("own", folder)
    change: Callable[[Any, str], Any] = lambda section, name: section.model_copy(  # noqa: E731
        update={"entrypoint": f"{module}:{name}"}
    )
    return job.model_copy(
        update={"task": change(job.task, "task"), "model": change(job.model, "build"), "data": change(job.data, "rows")}
    )


def _rehearse(job: JobSpec) -> None:
    rows = [{"x": np.full(4, n, np.float32), "y": np.float32(0.5)} for n in (1.0, 2.0)]
    rehearse(job, 0, task_of(job.task), torch.device("cpu"), rows)  # type: ignore[arg-type]


def test_a_task_that_sums_is_accepted(tmp_path: Path) -> None:
    _rehearse(_own(tmp_path, SUM))


@pytest.mark.parametrize("case", ["a mean", "other units", "nan", "no scalar", "calls by the number of rows"])
def test_what_is_wrong_with_a_loss_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    body, made, _ = BAD[case]
    line = TASK.splitlines().index("    def loss(self, model, batch):") + 1
    with pytest.raises(EntrypointError) as caught:
        _rehearse(_own(tmp_path, body, made))
    (file,) = tmp_path.glob("task_*.py")
    assert caught.value.message.startswith(f"{file}:{line}: ")


def test_numbers_in_metrics_are_exact(tmp_path: Path) -> None:
    job = _own(tmp_path, "return Loss(error.sum(), len(error), {'error': (2**24 + 1, 0.1)})")
    model: Any = SimpleNamespace(moe_layers=[], outputs=lambda x: x[:, 0])
    loss = task_of(job.task).loss(model, {"x": torch.ones(2, 4), "y": torch.zeros(2)})
    assert [each.item() for each in loss.metrics["error"]] == [2**24 + 1, 0.1]


def test_units_are_those_of_the_column_where_rows_have_one(tmp_path: Path) -> None:
    job = _own(tmp_path, "return Loss((error * batch['units']).sum(), int(batch['units'].sum()), metrics)")
    rows = [{"x": np.full(4, n, np.float32), "y": np.float32(0.5), "units": np.int64(n)} for n in (2, 3)]
    rehearse(job, 0, task_of(job.task), torch.device("cpu"), rows)  # type: ignore[arg-type]
    job = _own(tmp_path, SUM)
    with pytest.raises(EntrypointError, match="is a sum over 1 units; the data have 2") as refused:
        rehearse(job, 0, task_of(job.task), torch.device("cpu"), rows)  # type: ignore[arg-type]
    assert "column `units`" in refused.value.remedy


@pytest.mark.parametrize(("data_format", "units"), [("messages", "None"), ("preference", "len(total)")])
def test_a_task_on_chats_is_tried_on_drawn_ones(tmp_path: Path, data_format: str, units: str) -> None:
    (tmp_path / f"on_{data_format}.py").write_text(ON_CHATS.format(units=units))
    task = {"entrypoint": f"on_{data_format}:task", "code_dir": str(tmp_path)}
    plain = task_job("sft", tmp_path).model_dump(by_alias=True)
    job = JobSpec.model_validate(plain | {"task": task, "data": plain["data"] | {"format": data_format}})
    rehearse(job, 300, task_of(job.task, job.data_format), torch.device("cpu"))


def test_numbers_are_as_good_as_tensors_in_metrics(tmp_path: Path) -> None:
    _rehearse(_own(tmp_path, "return Loss(error.sum(), len(error), {'error': (float(error.sum()), len(error))})"))


@pytest.mark.parametrize("name", ["within@0.1", "a/b", "", "ä"])
def test_metrics_have_names_that_trackers_take(tmp_path: Path, name: str) -> None:
    job = _own(tmp_path, SUM, f"type('Named', (Task,), {{'metrics': ({name!r},)}})()")
    with pytest.raises(EntrypointError, match="names a metric"):
        _rehearse(job)


def test_a_task_that_compares_rows_is_accepted(tmp_path: Path) -> None:
    _rehearse(
        _own(tmp_path, "return Loss((error.sum() + error.std(unbiased=False).nan_to_num()), len(error), metrics)")
    )


@pytest.mark.parametrize(("body", "made", "message"), BAD.values(), ids=BAD.keys())
def test_what_a_task_may_not_do_is_named(tmp_path: Path, body: str, made: str, message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        _rehearse(_own(tmp_path, body, made))


COLLATED: dict[str, tuple[str, str]] = {
    "no axis": ("np.array(1.0)", r"collates 1 rows to x of type float64 and shape \(\)"),
    "objects": ("np.array([None] * len(rows))", r"collates 1 rows to x of type object"),
    "text": ("np.array(['a'] * len(rows))", r"collates 1 rows to x of type <U1"),
    "no rows": ("np.zeros((0, 4), np.float32)", r"collates 1 rows to x of type float32 and shape \(0, 4\)"),
    "fewer than rows": ("np.zeros((1, 4), np.float32)", r"collates 2 rows to x of type float32 and shape \(1, 4\)"),
    "a list": ("[row['x'] for row in rows]", "something else than numpy arrays"),
}


def _collating(x: str) -> str:
    collate = f"lambda self, rows, rng: {{'x': {x}, 'y': np.array([row['y'] for row in rows])}}"
    return f"type('Collating', (Task,), {{'collate': {collate}}})()"


@pytest.mark.parametrize(("x", "message"), COLLATED.values(), ids=COLLATED.keys())
def test_what_collate_may_not_return_is_named(tmp_path: Path, x: str, message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        _rehearse(_own(tmp_path, SUM, _collating(x)))


def test_rows_of_unequal_shapes_need_a_collate(tmp_path: Path) -> None:
    rows = [{"x": np.ones(n, np.float32), "y": np.float32(0.5)} for n in (4, 3)]
    padding = _collating("np.stack([np.pad(row['x'], (0, 4 - len(row['x']))) for row in rows])")
    for made in (padding, "Task()"):
        job = _own(tmp_path, SUM, made)
        if made == padding:
            rehearse(job, 0, task_of(job.task), torch.device("cpu"), rows)
            continue
        with pytest.raises(EntrypointError, match=r"differ in x: .* \(4,\), another one \(3,\)") as caught:
            rehearse(job, 0, task_of(job.task), torch.device("cpu"), rows)
        assert "collate(rows, rng) that pads" in caught.value.remedy


def test_a_loss_without_its_graph_is_the_same() -> None:
    value = torch.ones((), requires_grad=True)
    loss = Loss(value * 2, 3, {"m": (value * 3, value * 4)}).detached()
    assert (float(loss.total), loss.units, float(loss.metrics["m"][1])) == (2.0, 3, 4.0)
    assert not loss.total.requires_grad and not loss.metrics["m"][0].requires_grad
