"""Tasks through rescales and lost workers, in real processes: the bits of a run that nothing happens to."""

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.rows.row_store import RowStore
from orchestrator.protocol.messages import Restore
from orchestrator.protocol.step_record import StepRecord
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.protocol.worker_phase import Phase
from orchestrator.sampling.sample_ledger import audit
from orchestrator.spec.job import JobSpec
from orchestrator.spec.task import TaskSpec
from tests.support.tasks import TASKS, prepared, task_job
from tests.support.texts import OPTIMIZERS, small_job
from tests.support.worker_group import LocalWorkerGroup, commit_of

pytestmark = pytest.mark.usefixtures("device")

Records = dict[int, StepRecord]


def _calm(job: JobSpec, store_dir: Path, run_dir: Path) -> Records:
    """The records of a run on one worker to which nothing happens."""
    with LocalWorkerGroup(job, store_dir, run_dir, size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_finished()
    return worker_group.records


def _disturbed(job: JobSpec, store_dir: Path, run_dir: Path) -> Records:
    """The records of a run that grows from two to three workers, loses one, is paused, and resumed on one."""
    with LocalWorkerGroup(job, store_dir, run_dir, size=3) as worker_group:
        ids = worker_group.ids
        worker_group.start(worker_group.plan(ids[:2]))
        worker_group.await_step(worker_group.newest_step + 2)
        worker_group.rescale(ids)
        worker_group.await_step(worker_group.newest_step + 2)
        worker_group.members[ids[2]].kill()
        worker_group.recover(ids[:2])
        worker_group.await_step(worker_group.newest_step + 2)
        worker_group.finish()
        step, paused = worker_group.newest_step, worker_group.records
        restore = Restore(step, str(commit_of(worker_group, step)))
    assert step < job.train.max_steps - 1 and {record.world_size for record in paused.values()} == {2, 3}
    with LocalWorkerGroup(job, store_dir, run_dir, size=1) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids, restore=restore))
        worker_group.await_finished()
    assert min(worker_group.records) == step + 1
    return paused | worker_group.records


# Pairs that learn in the steps of `task_job`; others have only those that their moves take.
LEARN = {("sft", "lion"), ("dpo", "muon"), ("dpo", "adamw"), ("classification", "sgd"), ("own", "adafactor")}
ON_BOTH_DEVICES = {("dpo", "adamw")}
STEPS = 12
RATES = {("classification", "sgd"): 0.05, ("own", "sgd"): 0.02}  # where that of language modeling is too high


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, RowStore]]:
    """A task's folder, for `task_job`, and its prepared rows, by the task's name."""

    @cache
    def made(task: str) -> tuple[Path, RowStore]:
        folder = tmp_path_factory.mktemp(task)
        return folder, prepared(task_job(task, folder), folder / "data")

    return made


# Language modeling with each optimizer is in `test_moves`. On the emulated GPU `make test-all` tries the other pairs.
@pytest.mark.parametrize(
    ("task", "optimizer"),
    [
        pytest.param(*pair, marks=() if pair in ON_BOTH_DEVICES else pytest.mark.long_emulated)
        for pair in product(TASKS, OPTIMIZERS)
    ],
)
def test_every_task_with_every_optimizer_is_moved_recovered_and_resumed_bit_by_bit(
    tmp_path: Path, rows_of: Callable[[str], tuple[Path, RowStore]], task: str, optimizer: str
) -> None:
    learns = (task, optimizer) in LEARN
    update = OPTIMIZERS[optimizer] | ({} if learns else {"max_steps": STEPS})
    if (task, optimizer) in RATES:
        update["lr"] = RATES[task, optimizer]
    folder, store = rows_of(task)
    job = task_job(task, folder, determinism="exact", **update)
    # The default limit of a step's loss is made for language models; the regression's varies more than that.
    job = job.model_copy(update={"recovery": job.recovery.model_copy(update={"loss_explosion": None})})
    calm = _calm(job, store.directory, tmp_path / "calm")
    moved = _disturbed(job, store.directory, tmp_path / "moved")
    assert sorted(moved) == sorted(calm) == list(range(job.train.max_steps))
    ours, theirs = ([records[step] for step in sorted(records)] for records in (moved, calm))
    assert audit([(r.step, r.batch.first_position, r.batch.num_positions) for r in ours]).ok
    for one, other in zip(ours, theirs, strict=True):
        assert (one.loss, one.update.grad_norm, one.batch.tokens) == (
            other.loss,
            other.update.grad_norm,
            other.batch.tokens,
        )
        assert (one.metrics, one.validation_loss, one.validation_metrics) == (
            other.metrics,
            other.validation_loss,
            other.validation_metrics,
        )
    validations = [record for record in ours if record.validation_loss is not None]
    assert len(validations) > 1
    assert not learns or validations[-1].validation_loss < validations[0].validation_loss  # type: ignore[operator]
    wanted = {"dpo": {"accuracy", "margin", "chosen_reward", "rejected_reward"}, "sft": set(), "own": {"within"}}
    assert set(ours[0].metrics) == set(validations[0].validation_metrics) == wanted.get(task, {"accuracy"})


AS_USERS = """
from orchestrator.model.task import Loss

class Task:
    def loss(self, model, batch):
        return Loss(model(batch["inputs"], batch["targets"], batch.get("documents"), batch.get("lengths")))

def task(options):
    return Task()
"""


def _traffic(record: StepRecord) -> dict[str, Traffic]:
    """Without snapshots, which a thread sends: they are counted in the step in which it does."""
    return {kind: sent for kind, sent in record.communication.traffic.items() if kind != TrafficKind.PROTECTION}


def test_the_builtin_task_written_as_a_users_has_the_same_bits_and_collectives(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "as_users.py").write_text(AS_USERS)
    own = TaskSpec(entrypoint="as_users:task", code_dir=str(tmp_path))
    runs = []
    for task in (TaskSpec(), own):
        job = small_job(texts, max_steps=8).model_copy(update={"task": task})
        with LocalWorkerGroup(job, store_dir, tmp_path / str(len(runs)), size=2) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids))
            worker_group.await_finished()
        reports = [worker_group.final[worker] for worker in worker_group.ids]
        records = [worker_group.records[step] for step in range(8)]
        runs.append(
            (
                [(r.loss, r.update.grad_norm, r.validation_loss, _traffic(r)) for r in records[1:]],
                [report.process.collective for report in reports],
            )
        )
    assert runs[0] == runs[1]


OF_CHATS = """
import torch.nn.functional as F
from orchestrator.model.task import Loss

class Supervised:
    def loss(self, model, batch):
        return Loss(model(batch["inputs"], batch["targets"], None, batch["lengths"]))

class Preference:
    needs_reference = True

    def __init__(self, beta):
        self.beta = beta

    def loss(self, model, batch):
        losses = model.token_losses(batch["inputs"], batch["targets"], batch["lengths"])
        chosen, rejected = (-losses.sum(-1) - batch["reference"]).chunk(2)
        return Loss(-F.logsigmoid(self.beta * (chosen - rejected)).sum(), len(chosen))

def sft(options):
    return Supervised()

def dpo(options):
    return Preference(options["beta"])
"""


@pytest.mark.long_emulated
@pytest.mark.parametrize(("builtin", "data_format"), [("sft", "messages"), ("dpo", "preference")])
def test_a_users_task_gets_the_rows_of_a_builtin_one_and_with_its_formula_the_same_bits(
    tmp_path: Path, builtin: str, data_format: str
) -> None:
    (tmp_path / "of_chats.py").write_text(OF_CHATS)
    job = task_job(builtin, tmp_path, max_steps=4)
    options = {"beta": job.task.beta} if builtin == "dpo" else {}
    task = {"entrypoint": f"of_chats:{builtin}", "code_dir": str(tmp_path), "options": options}
    plain = job.model_dump(by_alias=True)
    own = JobSpec.model_validate(plain | {"task": task, "data": plain["data"] | {"format": data_format}})
    store = prepared(job, tmp_path / "data")
    assert prepared(own, tmp_path / "data").directory == store.directory
    (tmp_path / "without.py").write_text(OF_CHATS.replace("needs_reference = True", ""))
    without = own.model_copy(update={"task": own.task.model_copy(update={"entrypoint": f"without:{builtin}"})})
    columns = prepared(without, tmp_path / "data").read("train", np.arange(1))[0].keys()
    assert columns == {name for name in store.read("train", np.arange(1))[0] if not name.startswith("reference")}
    theirs, ours = (_calm(each, store.directory, tmp_path / each.task.unit) for each in (job, own))
    assert len(ours) == 4
    for step, record in theirs.items():
        found = ours[step]
        assert (found.loss, found.update.grad_norm, found.validation_loss) == (
            record.loss,
            record.update.grad_norm,
            record.validation_loss,
        )


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_a_world_of_two_learns_what_one_learns(tmp_path: Path, task: str) -> None:
    """In fast mode, in micro-batches of tokens where rows have some: the same loss to rounding."""
    size: dict[str, Any] = {"micro_batch_size": "96 tokens"} if task == "sft" else {}
    job = task_job(task, tmp_path, max_steps=6, **size)
    store = prepared(job, tmp_path / "data")
    losses = []
    for count in (1, 2):
        with LocalWorkerGroup(job, store.directory, tmp_path / str(count), size=count) as worker_group:
            worker_group.start(worker_group.plan(worker_group.ids))
            worker_group.await_finished()
        losses.append([worker_group.records[step].loss for step in range(6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


TWICE = """
import torch.distributed as dist
from orchestrator.model.task import Loss

class Task:
    def loss(self, model, batch):
        total = model(batch["inputs"], batch["targets"])
        if dist.is_initialized() and dist.get_rank() == 1:
            total = total + model(batch["inputs"], batch["targets"])
        return Loss(total)

def task(options):
    return Task()
"""


DIES = """
import os
import signal
import torch.distributed as dist
from orchestrator.model.task import Loss

class Task:
    def loss(self, model, batch):
        if dist.is_initialized() and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Loss(model(batch["inputs"], batch["targets"]))

def task(options):
    return Task()
"""


@pytest.mark.long_emulated
def test_a_peer_that_is_lost_in_a_users_loss_is_no_error_of_the_users(
    texts: Path, store_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    task = TaskSpec(entrypoint="dies:task", code_dir=str(tmp_path))
    job = small_job(texts, max_steps=8).model_copy(update={"task": task})
    with LocalWorkerGroup(job, store_dir, tmp_path / "run", size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_all(worker_group.ids[:1], lambda report: report.phase is Phase.STRANDED)
        error = worker_group.members["w0"].report().health.error
        assert error is not None and error.kind == "peer_lost" and "loss of task.entrypoint dies:task" in error.message
        for member in worker_group.members.values():
            member.kill()


@pytest.mark.long_emulated
def test_a_rank_that_calls_a_model_with_experts_twice_is_named(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    """Not as a peer that was lost, though the other rank takes part in one call only."""
    (tmp_path / "twice.py").write_text(TWICE)
    task = TaskSpec(entrypoint="twice:task", code_dir=str(tmp_path))
    job = small_job(texts, max_steps=8).model_copy(update={"task": task})
    with LocalWorkerGroup(job, store_dir, tmp_path / "run", size=2) as worker_group:
        worker_group.start(worker_group.plan(worker_group.ids))
        worker_group.await_all(worker_group.ids[1:], lambda report: report.phase is Phase.STRANDED)
        error = worker_group.members["w1"].report().health.error
        assert error is not None and error.kind == "user_error" and "more than once in a pass" in error.message
        for member in worker_group.members.values():
            member.kill()
