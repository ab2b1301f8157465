"""The oracle itself, in a world of one, against torch's own optimizer driven by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.process_groups import ProcessGroups, connect, disconnect
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.task import Batch
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.optimizer import is_decayed
from orchestrator.spec.train import TrainSpec
from tests.support.reference_engine import ReferenceEngine
from tests.support.small import empty, micro_batch

SPEC = ModelSpec(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    n_routed_experts=3,
    moe_intermediate_size=8,
)
TOKENS = 128  # targets of two micro-batches


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    yield connect(HashStore(), "test", 0, ExpertPlacement.balanced(3, 1), "gloo")
    disconnect()


def _model() -> MoELanguageModel:
    model = MoELanguageModel(SPEC, 128, ExpertParallelContext(ExpertPlacement.balanced(3, 1), 0, None))
    model.init_weights(0)
    return model


def _engine(groups: ProcessGroups, clipping: float = 1.0) -> tuple[MoELanguageModel, ReferenceEngine]:
    model = _model()
    engine = ReferenceEngine(model, TrainSpec(gradient_clipping=clipping), groups)
    engine.on_weights_initialized()
    return model, engine


@pytest.mark.parametrize("clipping", [0.0, 0.05, 1000.0])
def test_steps_equal_those_of_torch_on_the_mean_loss(alone: ProcessGroups, clipping: float) -> None:
    model, engine = _engine(alone, clipping)
    plain = _model()
    decayed = {name: is_decayed(name, param.shape) for name, param in plain.named_parameters()}
    groups = [
        {"params": [p for n, p in plain.named_parameters() if decayed[n] == wanted], "weight_decay": 0.1 * wanted}
        for wanted in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        batches: list[Batch] = [micro_batch(step, 0), micro_batch(step, 1), empty()]
        for batch in batches:
            engine.accumulate(batch, TOKENS, last=True)
        outcome = engine.step(1e-2)
        optimizer.zero_grad()
        sum((plain(b["inputs"], b["targets"]) for b in batches[:2]), torch.zeros(())).div(TOKENS).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clipping or float("inf"))
        optimizer.step()
        assert outcome.applied and outcome.grad_norm == pytest.approx(float(norm), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_non_finite_update_changes_nothing_and_is_forgotten(alone: ProcessGroups) -> None:
    model, engine = _engine(alone)
    before = [p.clone() for p in model.parameters()]
    hook = model.head.register_hook(lambda grad: grad * float("nan"))
    engine.accumulate(micro_batch(0, 0), TOKENS, last=True)
    hook.remove()
    assert not engine.step(1e-2).applied
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    engine.accumulate(micro_batch(0, 0), TOKENS, last=True)
    assert engine.step(1e-2).applied


def test_evaluation_leaves_no_trace(alone: ProcessGroups) -> None:
    model, engine = _engine(alone)
    loss, routed = engine.accumulate(micro_batch(0, 0), TOKENS, last=True)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert engine.evaluate(micro_batch(0, 0)).total.item() == pytest.approx(loss.total.item())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True) if p.grad is not None)
    assert routed.counts_LE.sum().item() == 64 * SPEC.num_experts_per_tok


def test_training_continues_from_values_written_to_the_ranges(alone: ProcessGroups) -> None:
    """Two steps here, then the state into another engine: the third step is the same in both."""
    model, engine = _engine(alone)
    other_model, other = _engine(alone)
    for step in range(2):
        engine.accumulate(micro_batch(step, 0), TOKENS, last=True)
        engine.step(1e-2)
    for name, held in engine.ranges():
        other.ranges().view(name, held.start, held.stop).copy_(held.data)
    other.on_state_loaded(2)
    for each in (engine, other):
        each.accumulate(micro_batch(2, 0), TOKENS, last=True)
        each.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))


def test_other_precisions_are_refused(alone: ProcessGroups) -> None:
    with pytest.raises(ValueError, match="bf16"):
        ReferenceEngine(_model(), TrainSpec(precision="bf16"), alone)
