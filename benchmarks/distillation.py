"""A small model that learns from a larger one too, against the same model on the targets alone, at equal tokens.

    python -m benchmarks.distillation [--quick]

On Python's own library a teacher is trained, on more tokens than its students get. Students are trained on the targets
alone, with that teacher, and, as a control, with the teacher's predictions for another row. Students with and without
teacher have as many settings tried with the first seed, learning rates and for distillation also alpha and temperature;
then all seeds train with the best. `gap closed` is the share of the difference between the held-out losses of plain
student and teacher that a student makes up for.

All models are dense. Runs are kept in a file, so it may be stopped, and goes on where it was. About 15 minutes on two
cores.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Result, at_least, mean_interval, run
from benchmarks.support.data import data_spec, prepared, stores_dir
from benchmarks.support.local_training import KeptResults, train, validation_loss
from orchestrator.data.store import TokenStore
from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.task import Task
from orchestrator.model.tasks.distillation import Distillation
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.job import JobSpec

SEEDS, QUICK_SEEDS = 3, 1
ROWS, LENGTH, VALIDATION_ROWS = 8, 128, 256
STEPS, TEACHER_STEPS, QUICK_STEPS = 500, 1500, 4
TEACHER = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 256}
TEACHER_LR = 4e-3
PLAIN = ((2e-3,), (4e-3,), (8e-3,), (16e-3,))  # learning rates
TAUGHT = ((4e-3, 0.5, 2.0), (8e-3, 0.5, 2.0), (4e-3, 0.9, 1.0), (8e-3, 0.9, 1.0))  # and alphas and temperatures
LEAST_CLOSED = 0.3
SOURCES = ("model", "sampling", "spec/train.py", "spec/optimizer.py", "engine/optim/lr_schedule.py")


@dataclass(frozen=True)
class Setting:
    """A student's learning rate, and with a teacher its weight and temperature."""

    lr: float
    alpha: float = 0.0
    temperature: float = 1.0


def measure(quick: bool) -> Result:
    seeds, steps = (QUICK_SEEDS, QUICK_STEPS) if quick else (SEEDS, STEPS)
    with tempfile.TemporaryDirectory(prefix="distillation-") as folder:
        workspace = Path(folder)
        stores = stores_dir(quick, workspace)
        store = prepared(data_spec(quick, workspace), stores)
        kept = KeptResults(stores, Path(__file__), f"{steps} {store.digest}", SOURCES)
        teacher = cache(partial(_teacher, store, QUICK_STEPS if quick else TEACHER_STEPS, kept.file(".pt")))
        of_teacher = kept.of("teacher", lambda: _validated(teacher(), store))["loss"]

        def of_student(kind: str, setting: Setting, seed: int) -> float:
            name = f"{kind} {setting} seed {seed}"
            measured = kept.of(name, lambda: _student(kind, setting, seed, steps, teacher, store))
            return float(measured["loss"])

        tried = {"plain": [Setting(*each) for each in PLAIN], "taught": [Setting(*each) for each in TAUGHT]}
        by_setting = {kind: {each: of_student(kind, each, 0) for each in of_kind} for kind, of_kind in tried.items()}
        best = {kind: min(of_kind, key=lambda each: of_kind[each]) for kind, of_kind in by_setting.items()}
        best["shuffled"] = best["taught"]
        losses = {kind: [of_student(kind, each, seed) for seed in range(seeds)] for kind, each in best.items()}
    closed = {
        kind: [(plain - mine) / (plain - of_teacher) for plain, mine in zip(losses["plain"], losses[kind], strict=True)]
        for kind in ("taught", "shuffled")
    }
    intervals = {kind: mean_interval(shares) if seeds > 1 else shares[0] for kind, shares in closed.items()}
    metrics = {
        "loss": {"teacher": of_teacher, **{kind: mean(of_kind) for kind, of_kind in losses.items()}},
        "losses": losses,
        "gap closed": intervals,
        "tried": {kind: {str(each): loss for each, loss in of_kind.items()} for kind, of_kind in by_setting.items()},
    }
    settings = {"quick": quick, "steps": steps, "rows": ROWS, "length": LENGTH, "teacher": TEACHER, "student": STUDENT}
    bar = at_least("gap closed", LEAST_CLOSED, intervals["taught"])
    return Result("distillation", 0, settings, seeds, metrics, bars=(bar,))


def _job(sizes: Mapping[str, Any], lr: float, seed: int, steps: int) -> JobSpec:
    model = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}
    model["first_k_dense_replace"] = model["num_hidden_layers"]
    train = {
        "global_batch_size": ROWS,
        "micro_batch_size": ROWS,
        "sequence_length": LENGTH,
        "max_steps": steps,
        "lr": lr,
        "seed": seed,
        "lr_scheduler": {"kind": "cosine", "warmup_steps": steps // 10},
    }
    return JobSpec.model_validate({"name": "distillation", "model": model, "train": train})


def _model(job: JobSpec, store: TokenStore) -> TrainableModel:
    model = build_model(job.model, store.vocab_size, single_rank(job.model))
    model.init_weights(job.train.seed)
    return model


def _teacher(store: TokenStore, steps: int, weights: Path) -> TrainableModel:
    job = _job(TEACHER, TEACHER_LR, 0, steps)
    model = _model(job, store)
    if not weights.exists():
        train(model, LanguageModeling(), job, store)
        torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights))
    return model.eval().requires_grad_(False)


def _student(
    kind: str, setting: Setting, seed: int, steps: int, teacher: Any, store: TokenStore
) -> Mapping[str, float]:
    job = _job(STUDENT, setting.lr, seed, steps)
    model, task = _model(job, store), _task(kind, setting, teacher)
    step_s = train(model, task, job, store)
    return {**_validated(model, store), "step_s": step_s}


def _task(kind: str, setting: Setting, teacher: Any) -> Task:
    if kind == "plain":
        return LanguageModeling()
    spec = DistillSpec(teacher="teacher", alpha=setting.alpha, temperature=setting.temperature)
    model = teacher() if kind == "taught" else _OfOtherRows(teacher())
    return Distillation(LanguageModeling(), model, spec)


class _OfOtherRows:
    """A teacher whose predictions are those for the row before."""

    def __init__(self, teacher: TrainableModel) -> None:
        self._teacher = teacher

    def eval(self) -> "_OfOtherRows":
        return self

    def scores(self, inputs_BT: Tensor, *rest: Tensor | None) -> TokenScores:
        return self._teacher.scores(inputs_BT.roll(1, 0), *rest)


def _validated(model: TrainableModel, store: TokenStore) -> dict[str, float]:
    job = _job(STUDENT, TEACHER_LR, 0, 1)
    return {"loss": validation_loss(model, LanguageModeling(), job, store, VALIDATION_ROWS)}


if __name__ == "__main__":
    run(__doc__, measure)
