"""Tasks: what a user's own one costs beside the built-in one, and what the tasks of jobs/ learn.

    python -m benchmarks.tasks [--quick]

- `cost`: an engine trains rows of text with the built-in task, and with the same task written as a user's, a function
  that a job names. They take turns, a step each; `cost` is the median of the second's time over the first's, less one.
  Some steps of each alone must end with the same bits. That both enter the same collectives between workers is in
  `tests/integration/test_tasks.py`.
- `digits`: jobs/digits.yaml, against a plain loop of torch with the same model, rows and learning rates, whose loss is
  the mean of a batch's cross-entropy and whose routers aren't balanced.
- `dpo`: jobs/dpo.yaml on pairs made of Python's documentation, and as a control the same with each pair's order drawn
  by chance. Accuracy is that on held-out pairs.
- `sft`: jobs/sft.yaml, the validation loss at its end over that at its beginning.

All of it in this process, in a world of one: feeds, tasks, engines and routers' biases are the product's.
"""

import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch._C._distributed_c10d import HashStore

from benchmarks.harness import ROOT, Bar, Result, alternate, at_least, at_most, median_interval, ratios, run, say
from benchmarks.support.data import data_spec, prepared, stores_dir
from jobs.rows.docstrings import chats, pairs
from orchestrator.data.rows.prepare_rows import prepare_rows
from orchestrator.data.rows.reference_rows import with_reference
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.store import TokenStore
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.optim.lr_schedule import learning_rate
from orchestrator.engine.process_groups import connect, disconnect
from orchestrator.model.base import TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Batch, Loss, Row, Task
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.policy.state.config import micro_batch_of
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import load_job
from orchestrator.spec.task import TaskSpec
from orchestrator.worker.step.batches import BatchReader, StepBatches
from orchestrator.worker.step.routing import move_router_state
from orchestrator.worker.step.row_batches import RowBatches
from orchestrator.worker.step.token_batches import TokenBatches

MOST_COST, ACCURACY, POINTS, PREFERRED = 0.03, 0.95, 0.01, 0.8  # bars
ROUNDS, QUICK_ROUNDS, COMPARED_STEPS = 40, 2, 5
CPU = torch.device("cpu")
AS_USERS = """
from orchestrator.model.task import Loss


class Task:
    def loss(self, model, batch):
        return Loss(model(batch["inputs"], batch["targets"], batch.get("documents"), batch.get("lengths")))


def task(options):
    return Task()
"""


@dataclass
class Loop:
    """Steps of a job in a world of one."""

    job: JobSpec
    feed: BatchReader
    task: Task
    num_outputs: int
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        placement = ExpertPlacement.balanced(self.job.model.n_routed_experts, 1)
        groups = connect(HashStore(), f"tasks-{id(self)}", 0, placement, "gloo")
        self.model = build_model(self.job.model, self.num_outputs, single_rank(self.job.model))
        self.engine = DeepSpeedEngineAdapter(self.model, self.job.train, groups, CPU, task=self.task)
        self.model.init_weights(self.job.train.seed)
        self.engine.on_weights_initialized()

    def train(self) -> float:
        """One step. Returns its seconds."""
        batches = self.feed.step(self.step, 0, 1, micro_batch_of(self.job))
        began_s, total = time.perf_counter(), 0.0
        routed = RoutingCounts.zeros(len(self.model.moe_layers), self.job.model)
        for number, micro_batch in enumerate(batches.micro_batches, 1):
            last = number == len(batches.micro_batches)
            loss, counted = self.engine.accumulate(micro_batch.batch, batches.global_units, last)
            total += float(loss.total)
            routed.add(counted)
        assert self.engine.step(learning_rate(self.job.train, self.step)).applied
        move_router_state(self.job, self.model, routed, self.step)
        self.losses.append(total / batches.global_units)
        self.step += 1
        return time.perf_counter() - began_s

    def validated(self) -> tuple[float, dict[str, float]]:
        """Mean loss and metrics on the validation rows."""
        return evaluated(self.model, self.task, self.feed.validation(0, 1, micro_batch_of(self.job)))

    def close(self) -> None:
        self.engine.close()
        disconnect()


@torch.no_grad()
def evaluated(model: TrainableModel, task: Task, batches: StepBatches) -> tuple[float, dict[str, float]]:
    """Mean loss and metrics of the task on these micro-batches."""
    model.eval()
    found = [task.loss(model, micro_batch.batch) for micro_batch in batches.micro_batches]
    model.train()
    sums = {name: [sum(float(loss.metrics[name][n]) for loss in found) for n in (0, 1)] for name in task.metrics}
    means = {name: each / weight for name, (each, weight) in sums.items()}
    return sum(float(loss.total) for loss in found) / batches.global_units, task.report(means)


def measure(quick: bool) -> Result:
    with tempfile.TemporaryDirectory(prefix="tasks-") as folder:
        workspace = Path(folder)
        cost = cost_of_own_task(workspace, quick)
        digits = digits_learned(workspace, quick)
        dpo = {name: pairs_learned(workspace, quick, name) for name in ("pairs", "by chance")}
        sft = chats_learned(workspace, quick)
    bars: list[Bar] = [
        at_most("cost", MOST_COST, cost["cost"]),
        at_least("accuracy of digits", ACCURACY, digits["accuracy"]),
        at_most("points below the plain loop", POINTS, digits["plain accuracy"] - digits["accuracy"]),
        at_least("accuracy of dpo", PREFERRED, dpo["pairs"]["accuracy"]),
    ]
    return Result(
        name="tasks",
        seed=0,
        settings={"quick": quick, "jobs": ["digits", "dpo", "sft"]},
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        metrics={"cost": cost, "digits": digits, "dpo": dpo, "sft": sft},
        bars=tuple(bars),
    )


# -- what a user's own task costs --------------------------------------------------------------------------------------


def cost_of_own_task(workspace: Path, quick: bool) -> dict[str, Any]:
    """The built-in task, and the same as a user's, in alternation."""
    (workspace / "as_users.py").write_text(AS_USERS)
    data = data_spec(quick, workspace)
    store = TokenStore.open(prepared(data, stores_dir(quick, workspace)).directory)
    train = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 128, "max_steps": 1000}
    job = JobSpec.model_validate({"schema": "v1", "name": "cost", "train": train, "data": data})
    own = task_of(TaskSpec(entrypoint="as_users:task", code_dir=str(workspace)))
    tasks: dict[str, Task] = {"built-in": task_of(TaskSpec()), "own": own}
    ends = {name: _end_of(job, store, task) for name, task in tasks.items()}
    same = all(torch.equal(held, ends["own"].state[name]) for name, held in ends["built-in"].state.items())
    assert same and ends["built-in"].losses == ends["own"].losses

    either = _Either(tasks)
    loop = Loop(job, TokenBatches(job, store, CPU), either, store.vocab_size)

    def step(name: str) -> float:
        either.chosen = name
        return loop.train()

    for name in (*tasks, *tasks):  # warm
        step(name)
    taken = alternate({name: partial(step, name) for name in tasks}, QUICK_ROUNDS if quick else ROUNDS)
    loop.close()
    cost = median_interval([ratio - 1.0 for ratio in ratios(taken["own"], taken["built-in"])])
    say(f"a user's task costs {cost.median:.2%} [{cost.low:.2%}, {cost.high:.2%}], same bits: {same}")
    return {"cost": cost, "same_bits": same}


@dataclass(frozen=True)
class _End:
    """State after some steps, and their losses."""

    state: dict[str, torch.Tensor]
    losses: list[float]


def _end_of(job: JobSpec, store: TokenStore, task: Task) -> _End:
    loop = Loop(job, TokenBatches(job, store, CPU), task, store.vocab_size)
    for _ in range(COMPARED_STEPS):
        loop.train()
    state = {name: held.data.clone() for name, held in loop.engine.ranges()}
    loop.close()
    return _End(state, loop.losses)


class _Either:
    """One of several tasks of text, for each step anew: only one engine can be in a process."""

    metrics: tuple[str, ...] = ()
    needs_reference = False

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks, self.chosen = tasks, next(iter(tasks))

    def collate(self, rows: Sequence[Row], rng: np.random.Generator) -> Mapping[str, NDArray[np.generic]]:
        raise NotImplementedError("the token store collates text")

    def loss(self, model: TrainableModel, batch: Batch) -> Loss:
        return self._tasks[self.chosen].loss(model, batch)

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        return {}


# -- what tasks learn --------------------------------------------------------------------------------------------------


def _loop_of(job: JobSpec, store: RowStore) -> Loop:
    task = task_of(job.task)
    return Loop(job, RowBatches(job, store, task, CPU), task, store.manifest.num_outputs)


def _job(name: str, quick: bool, settings: Mapping[str, Any] = MappingProxyType({})) -> JobSpec:
    wanted = dict(settings)
    if name == "digits":
        wanted |= {"model.code_dir": str(ROOT), "data.code_dir": str(ROOT)}
    if quick:
        wanted |= {"train.max_steps": 3, "train.lr_scheduler.warmup_steps": 1}
    return load_job(ROOT / "jobs" / f"{name}.yaml", [f"{key}={value}" for key, value in wanted.items()])


def digits_learned(workspace: Path, quick: bool) -> dict[str, float]:
    """Accuracy on the held-out images, and that of a plain loop."""
    job = _job("digits", quick)
    store = prepare_rows(job, workspace / "rows")
    loop = _loop_of(job, store)
    for _ in range(job.train.max_steps):
        loop.train()
    loss, metrics = loop.validated()
    plain = _plainly_trained(job, loop)
    loop.close()
    say(f"digits: accuracy {metrics['accuracy']:.4f}, of a plain loop {plain['accuracy']:.4f}")
    found = {"accuracy": metrics["accuracy"], "loss": loss, "plain accuracy": plain["accuracy"]}
    return {**found, "plain loss": plain["loss"]}


def _plainly_trained(job: JobSpec, loop: Loop) -> dict[str, float]:
    model = build_model(job.model, loop.num_outputs, single_rank(job.model))
    model.init_weights(job.train.seed)
    decayed = {
        name: job.train.optimizer.settings_of(name, p.shape).weight_decay for name, p in model.named_parameters()
    }
    groups = [
        {"params": [p for name, p in model.named_parameters() if decayed[name] == decay], "weight_decay": decay}
        for decay in sorted({*decayed.values()})
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=job.train.optimizer.betas, eps=job.train.optimizer.eps)
    size = micro_batch_of(job)
    for step in range(job.train.max_steps):
        batches = [micro_batch.batch for micro_batch in loop.feed.step(step, 0, 1, size).micro_batches]
        inputs, labels = (torch.cat([batch[name] for batch in batches]) for name in ("inputs", "labels"))
        F.cross_entropy(model.outputs(inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job.train, step)
        optimizer.step()
        optimizer.zero_grad()
    loss, metrics = evaluated(model, loop.task, loop.feed.validation(0, 1, size))
    return {"loss": loss, **metrics}


def pairs_learned(workspace: Path, quick: bool, order: str) -> dict[str, float]:
    """Loss and metrics on held-out pairs, of which `by chance` has as many with the better answer rejected."""
    path, draw = workspace / f"{order}.jsonl", random.Random(1)
    with path.open("w") as file:
        for row in pairs():
            if order == "by chance" and draw.random() < 0.5:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            file.write(json.dumps(row) + "\n")
    job = _job("dpo", quick, {"data.source": path})
    rows = prepare_rows(job, workspace / "rows")
    loop = _loop_of(job, with_reference(job, rows, workspace / "rows", lambda stage, share: None))
    for _ in range(job.train.max_steps):
        loop.train()
    loss, metrics = loop.validated()
    loop.close()
    say(f"dpo, {order}: loss {loop.losses[0]:.3f} at first, validation {loss:.3f}, accuracy {metrics['accuracy']:.3f}")
    return {"first loss": loop.losses[0], "loss": loss, **metrics}


def chats_learned(workspace: Path, quick: bool) -> dict[str, float]:
    """Validation loss before and after."""
    path = workspace / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    job = _job("sft", quick, {"data.source": path})
    loop = _loop_of(job, prepare_rows(job, workspace / "rows"))
    first, _ = loop.validated()
    for _ in range(job.train.max_steps):
        loop.train()
    last, _ = loop.validated()
    loop.close()
    say(f"sft: validation loss {first:.3f} to {last:.3f}")
    return {"first": first, "last": last}


if __name__ == "__main__":
    run(__doc__, measure)
