"""The phases of a step and their order, with an engine that does nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.elastic.world import World
from orchestrator.engine.base import StepOutcome
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.task import Loss
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.job import JobSpec
from orchestrator.worker.runtime.errors import StateCorrupted
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.step.batches import StepBatches, StepMicroBatch
from orchestrator.worker.step.hooks import RankProposal
from orchestrator.worker.step.train_step import StepResult, TrainStep
from orchestrator.worker.step.vote import NO_FENCE

JOB = JobSpec.model_validate(
    {
        "schema": "v1",
        "name": "try",
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "n_routed_experts": 2},
    }
    | {"eval": {"every": 5}}
)


class _Parts:
    """Engine, reader, hooks, memory guard and tuner of a step in one: notes each call."""

    order, scheme, proposal = "order", "none", -1

    def __init__(self, applied: bool = True, changed: tuple[str, ...] = ()) -> None:
        self.calls: list[str] = []
        self.applied, self.changed = applied, changed

    # The reader
    is_local = True

    def step(self, *args: Any) -> Any:
        if isinstance(args[0], float):  # the engine's, with a learning rate
            self.calls.append("update")
            args[1]()
            return StepOutcome(self.applied, 1.5)
        return self.validation(*args[1:])

    def validation(self, *_: Any) -> StepBatches:
        rows = tuple(StepMicroBatch(number, {}) for number in (0, None))
        return StepBatches(rows, 1, 10, 10, first_position=0, num_positions=4, tokens=(10,), padded_tokens=(10,))

    # The engine
    def accumulate(self, *_: Any) -> tuple[Loss, RoutingCounts]:
        self.calls.append("accumulate")
        return Loss(torch.tensor(30.0)), RoutingCounts.zeros(0, JOB.model)

    def evaluate(self, _: Any) -> Loss:
        self.calls.append("evaluate")
        return Loss(torch.tensor(20.0))

    # The hooks
    def wait_for_rows(self, _: Any) -> None:
        pass

    def before_micro_batch(self) -> None:
        self.calls.append("before_micro_batch")

    def before_update(self) -> None:
        self.calls.append("before_update")

    def propose(self, step: int) -> RankProposal:
        self.calls.append(f"propose {step}")
        return RankProposal(NO_FENCE, finish=True, interval=4)

    # The memory guard
    def open(self) -> tuple[str, ...]:
        self.calls.append("open")
        return self.changed

    def close(self) -> None:
        self.calls.append("close")

    # The tuner of compression
    def observe(self, *_: Any) -> None:
        self.calls.append("observe")

    def agree(self, _: int) -> None:
        self.calls.append("agree")


def _do(parts: _Parts, step: int, skips: frozenset[int] = frozenset()) -> StepResult:
    shard: Any = SimpleNamespace(
        rank=0,
        world=World(2, ("w0",)),
        groups=SimpleNamespace(exchange=None),
        model=SimpleNamespace(moe_layers=[], zero_counts=lambda device: RoutingCounts.zeros(0, JOB.model, device)),
        micro_batch=None,
        skips=skips,
        shares_LEW=np.zeros((0, 2, 1)),
        fingerprint=lambda _: None,
        engine=parts,
        seal=parts,
        choosing=parts,
    )
    factory: Any = SimpleNamespace(spec=JOB, device=torch.device("cpu"), task=LanguageModeling())
    train_step = TrainStep(factory, parts)  # type: ignore[arg-type]
    try:
        return train_step.step(shard, TrainingProgress(step - 1, 3, "order"), parts, keep_gradients=False)
    finally:
        train_step.close()


def test_a_step_loads_accumulates_updates_and_votes() -> None:
    parts = _Parts()
    result = _do(parts, 2)
    passes = ["before_micro_batch", "accumulate"] * 2
    assert parts.calls == [*passes, "open", "update", "before_update", "observe", "propose 2", "agree", "close"]
    record = result.record
    assert (record.step, record.generation, record.loss, record.validation_loss) == (2, 2, 3.0, None)
    assert record.update.applied and not record.update.skipped and record.update.grad_norm == 1.5
    assert (record.batch.tokens, record.batch.num_positions) == (10, 4)
    assert result.outcome.finish and result.outcome.interval == 4
    assert result.progress == TrainingProgress(2, 4, "order")
    timing = record.timing
    assert 0 <= timing.data_wait_s + timing.protection_wait_s <= timing.step_s


def test_validation_comes_between_the_update_and_the_vote() -> None:
    parts = _Parts()
    result = _do(parts, 4)
    update, vote = parts.calls.index("before_update"), parts.calls.index("observe")
    assert parts.calls[update + 1 : vote] == ["before_micro_batch", "evaluate"] * 2
    assert result.record.validation_loss == 2.0


def test_a_batch_that_is_left_out_is_evaluated_and_updates_nothing() -> None:
    parts = _Parts()
    result = _do(parts, 2, skips=frozenset({2}))
    assert parts.calls == ["open", *["before_micro_batch", "evaluate"] * 2, "propose 2", "agree", "close"]
    assert result.record.update.skipped and not result.record.update.applied and result.record.loss == 2.0
    assert result.progress == TrainingProgress(2, 3, "order")


def test_changed_memory_ends_the_step_before_its_update() -> None:
    parts = _Parts(changed=("master/norm",))
    with pytest.raises(StateCorrupted, match="master/norm of rank 0 on .* changed between the ends of steps 1 and 2"):
        _do(parts, 2)
    assert "update" not in parts.calls


def test_an_update_that_was_not_finite_counts_as_none() -> None:
    result = _do(_Parts(applied=False), 2)
    assert result.record.update.grad_norm == float("inf") and result.progress.num_updates == 3
