"""Jobs of tasks on rows, small enough to train in a test, with their prepared stores."""

import json
import random
from pathlib import Path
from typing import Any

from orchestrator.data.rows.prepare_rows import prepare_rows
from orchestrator.data.rows.reference_rows import with_reference
from orchestrator.data.rows.row_store import RowStore
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import PREFERENCE
from tests.support.own_models import ROOT

TASKS = ("sft", "dpo", "classification", "own")
WORDS = ["river", "stone", "cloud", "paper", "window", "garden", "letter", "silver", "winter", "mountain"]


def write_chats(path: Path, count: int = 60) -> Path:
    """Chats in which the assistant repeats a word of the user's; answers are of different length."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            word = draw.choice(WORDS)
            answer = " ".join([word] * draw.randint(1, 6))
            turns = [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": answer}]
            if draw.random() < 0.3:
                turns += [{"role": "user", "content": "again"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(path: Path, count: int = 60) -> Path:
    """Pairs of which the chosen answer repeats the user's word, and the rejected one another."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            word, other = draw.sample(WORDS, 2)
            number = draw.randint(1, 4)
            row = {"prompt": f"say {word}", "chosen": f"{word} " * number, "rejected": f"{other} " * number}
            file.write(json.dumps(row) + "\n")
    return path


OWN = """
import numpy as np
import torch
from torch import nn
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.task import Loss


class Model(nn.Module):
    def __init__(self, spec, experts):
        super().__init__()
        self.inputs, self.moe = nn.Linear(4, spec.hidden_size), MoELayer(spec, experts)
        self.outputs = nn.Linear(spec.hidden_size, 1)

    def forward(self, x):
        return self.outputs(self.moe(torch.tanh(self.inputs(x))))[:, 0]


def build(spec, vocab_size, experts):
    return Model(spec, experts)


class Regression:
    metrics = ("within",)

    def collate(self, rows, rng):
        x = np.stack([row["x"] for row in rows])
        noise = rng.normal(0.0, 0.01, x.shape).astype(np.float32)
        return {"x": x + noise, "y": np.stack([row["y"] for row in rows])}

    def loss(self, model, batch):
        error = (model.outputs(batch["x"].to(next(model.parameters()).dtype)).float() - batch["y"]).abs()
        count = torch.full((), float(len(error)), device=error.device)
        return Loss(error.square().sum(), len(error), {"within": ((error < 0.1).float().sum(), count)})


def regression(options):
    return Regression()


def rows(split, options):
    draw = np.random.default_rng(1 if split == "train" else 2)
    x = draw.normal(size=(60 if split == "train" else 12, 4)).astype(np.float32)
    return [{"x": each, "y": np.float32(each[0] * each[1] + each[2])} for each in x]
"""


def task_job(task: str, folder: Path, **train: Any) -> JobSpec:
    """A job of 24 steps; its rows or its code are written to `folder`."""
    model: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    job: dict[str, Any] = {"schema": "v1", "name": task, "task": {"name": task}, "eval": {"every": 8, "rows": 8}}
    if task in ("sft", "dpo"):
        write = write_chats if task == "sft" else write_pairs
        job["data"] = {"source": str(write(folder / f"{task}.jsonl")), "vocab_size": 320, "holdout": 0.2}
    elif task == "classification":
        job["data"] = {"entrypoint": "jobs.rows.digits:rows", "code_dir": str(ROOT)}
        model |= {"entrypoint": "jobs.models.patches:build", "code_dir": str(ROOT), "options": {"side": 8, "patch": 4}}
    else:
        (folder / "own_task.py").write_text(OWN)
        here = {"code_dir": str(folder)}
        job["task"] = {"entrypoint": "own_task:regression", **here}
        job["data"] = {"entrypoint": "own_task:rows", **here}
        model |= {"entrypoint": "own_task:build", **here}
    sizes = {"max_steps": 24, "lr": 5e-3, "global_batch_size": 10, "micro_batch_size": 2, "sequence_length": 48}
    return JobSpec.model_validate({**job, "model": model, "train": {**sizes, **train}})


def prepared(job: JobSpec, directory: Path) -> RowStore:
    """The job's rows, as a run prepares them."""
    store = prepare_rows(job, directory)
    return with_reference(job, store, directory, lambda stage, share: None) if job.data_format == PREFERENCE else store
