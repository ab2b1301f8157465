"""Training of a model in one process, without engine or workers: for benchmarks of what is learned, where thousands of
steps are compared; and results that are kept, so that a benchmark goes on where it was stopped."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import ROOT, say
from orchestrator.data.store import Rows, TokenStore
from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.model.base import TrainableModel
from orchestrator.model.task import Batch, Task
from orchestrator.sampling.sampler import SamplerState, sample
from orchestrator.spec.job import JobSpec


class KeptResults:
    """What arms have shown, by name, in a file that is named by all that it depends on.

    Args:
        directory: in which the file is.
        benchmark: its own file.
        settings: that aren't in that file.
        sources: parts of the package, beside the benchmark.
    """

    def __init__(self, directory: Path, benchmark: Path, settings: str, sources: tuple[str, ...]) -> None:
        of = hashlib.sha256(f"{settings} {torch.__version__}".encode())
        for source in (benchmark, Path(__file__), *(ROOT / "orchestrator" / room for room in sources)):
            for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
                of.update(file.read_bytes())
        self._file = directory / f"{benchmark.stem}-{of.hexdigest()[:12]}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known = {entry["arm"]: entry["measured"] for entry in map(json.loads, lines)}

    def file(self, suffix: str) -> Path:
        """A further file of the same name."""
        return self._file.with_suffix(suffix)

    def of(self, arm: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What an arm has shown; it is measured if that isn't known yet."""
        if arm not in self._known:
            self._known[arm] = dict(measure())
            with self._file.open("a") as file:
                print(json.dumps({"arm": arm, "measured": self._known[arm]}), file=file)
            say(f"{arm}: {self._known[arm]}")
        return self._known[arm]


def nothing(number: int) -> None:
    """The default hook of an update."""


def train(
    model: TrainableModel,
    task: Task,
    job: JobSpec,
    store: TokenStore,
    steps: range | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    before_update: Callable[[int], None] = nothing,
    after_update: Callable[[int], None] = nothing,
) -> float:
    """Train dense weights on the rows that a run of the job gets, in one micro-batch a step. Returns a step's median
    seconds.

    Args:
        steps: None: all of the job.
        optimizer: with the state after the steps before; None: a new one.
        before_update, after_update: called with an update's number, counted from 1.
    """
    options = job.train
    trained = _trained(model, job)
    optimizer = optimizer or optimizer_of(model, job)
    length = options.sequence_length
    sampler = SamplerState(options.seed, options.global_batch_size, length, store.num_rows("train", length))
    model.train()
    spent_s = []
    for step in steps or range(options.max_steps):
        began_s = time.perf_counter()
        rows = store.rows("train", sample(sampler, step), length)
        (task.loss(model, _batch(rows)).total / _num_targets(rows)).backward()
        torch.nn.utils.clip_grad_norm_(trained, options.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        before_update(step + 1)
        optimizer.step()
        after_update(step + 1)
        optimizer.zero_grad()
        spent_s.append(time.perf_counter() - began_s)
    return float(np.median(spent_s))


def optimizer_of(model: TrainableModel, job: JobSpec) -> torch.optim.Optimizer:
    """AdamW, as the job has it."""
    given = job.train.optimizer
    return torch.optim.AdamW(_trained(model, job), job.train.lr, given.betas, given.eps, given.weight_decay, fused=True)


def _trained(model: TrainableModel, job: JobSpec) -> list[torch.nn.Parameter]:
    return [param for name, param in model.named_parameters() if job.train.is_trained(name)]


@torch.no_grad()
def validation_loss(model: TrainableModel, task: Task, job: JobSpec, store: TokenStore, num_rows: int) -> float:
    """The task's loss in nats per target, on rows drawn from the validation split."""
    model.eval()
    loss_sum, num_targets = 0.0, 0
    for rows in _drawn(store, job.train.sequence_length, num_rows, job.train.global_batch_size):
        loss_sum += float(task.loss(model, _batch(rows)).total)
        num_targets += _num_targets(rows)
    return loss_sum / num_targets


def _drawn(store: TokenStore, length: int, num_rows: int, at_once: int) -> Iterator[Rows]:
    drawn = np.sort(np.random.default_rng(0).permutation(store.num_rows("validation", length))[:num_rows])
    for start in range(0, len(drawn), at_once):
        yield store.rows("validation", drawn[start : start + at_once], length)


def _batch(rows: Rows) -> Batch:
    return {"inputs": torch.from_numpy(rows.inputs_RT), "targets": torch.from_numpy(rows.targets_RT)}


def _num_targets(rows: Rows) -> int:
    return int((rows.targets_RT >= 0).sum())
