"""Losses of exits against the plain sum of cross-entropies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED, CrossEntropy, JointLoss, chunked_loss
from orchestrator.model.tasks.distillation import Distillation, DistillationLoss, FullDistribution
from orchestrator.model.tasks.exit_losses import ExitLosses
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

N, D, V, LAYERS = 50, 12, 40, 5
EXITS = ExitsSpec(layers=(1, 3), loss_weights=(0.3, 0.7))
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "scoring_func": "softmax",
    "router_aux_loss_coef": 0.0,
}


def _model(**keys: Any) -> TrainableModel:
    spec = ModelSpec(**(SIZES | keys))
    with devices.device():
        model = build_model(spec, V, single_rank(spec))
    model.init_weights(0)
    return model


def _batch(lengths: list[int] | None = None) -> dict[str, Tensor]:
    tokens = torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[:, 4] = IGNORED
    batch = {"inputs": inputs, "targets": targets}
    if lengths is not None:
        batch["lengths"] = torch.tensor(lengths)
        targets[torch.arange(10) >= batch["lengths"][:, None]] = IGNORED
    return {name: tensor.to(devices.device()) for name, tensor in batch.items()}


def _gradients(model: TrainableModel, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("chunk", [7, 40, 64, 1000])
def test_a_joint_loss_has_the_first_value_and_all_gradients(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(N, D, generator=generator).to(devices.device()).requires_grad_() for _ in range(3)]
    head_VD = torch.randn(V, D, generator=generator).to(devices.device()).requires_grad_()
    targets_N = (torch.arange(N) % V).to(devices.device())
    targets_N[::7] = IGNORED
    weights = (1.0, 0.3, 2.0)
    plain = [F.cross_entropy(x @ head_VD.T, targets_N, ignore_index=IGNORED, reduction="sum") for x in states]
    wanted = torch.autograd.grad(sum(w * each for w, each in zip(weights, plain, strict=True)), (*states, head_VD))
    joint = JointLoss(CrossEntropy(targets_N), weights, N)
    total, sums = chunked_loss(torch.cat(states), head_VD, joint, chunk)
    found = torch.autograd.grad(total, (*states, head_VD))
    torch.testing.assert_close(total, plain[0])
    torch.testing.assert_close(sums, torch.stack(plain).detach())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 40, 64])
def test_chunks_of_several_states_go_with_a_teacher_and_with_bf16(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_3ND, taught_NV = torch.randn(3, N, D, generator=generator), 3 * torch.randn(N, V, generator=generator)
    x_3ND, taught_NV = x_3ND.to(devices.device()).bfloat16(), taught_NV.to(devices.device())
    head_VD = torch.randn(V, D, generator=generator).to(devices.device()).bfloat16().requires_grad_()
    targets_N = (torch.arange(N) % V).to(devices.device())
    teacher = FullDistribution(TokenScores(taught_NV, None, None), 2.0)
    loss, weights = DistillationLoss(targets_N, teacher, 2.0, 0.7), (1.0, 0.3, 2.0)
    states = [x_ND.clone().requires_grad_() for x_ND in x_3ND]
    total, sums = chunked_loss(torch.cat(states), head_VD, JointLoss(loss, weights, N), chunk)
    found = torch.autograd.grad(total, (*states, head_VD))
    parts = [chunked_loss(x, head_VD, loss, N) for x in states]
    wanted = torch.autograd.grad(sum(w * part for w, (part, _) in zip(weights, parts, strict=True)), (*states, head_VD))
    torch.testing.assert_close(sums.view(3, 3), torch.stack([each for _, each in parts]), rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lengths", [None, [10, 4, 7]], ids=["packed", "padded"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "sqrt", "full"])
def test_exits_learn_by_their_own_losses(lengths: list[int] | None, checkpointing: str) -> None:
    """Each exit's loss is that of a model that ends there, whose final norm and output matrix are the same."""
    model, batch = _model(exits=EXITS, gradient_checkpointing=checkpointing), _batch(lengths)
    loss = ExitLosses(LanguageModeling(), EXITS).loss(model, batch)
    found = _gradients(model, loss.total)
    wanted: dict[str, Tensor] = {}
    for layers, weight in ((1, 0.3), (3, 0.7), (LAYERS, 1.0)):
        shorter = _model(num_hidden_layers=layers)
        shorter.load_state_dict(model.state_dict(), strict=False)
        plain = LanguageModeling().loss(shorter, batch).total
        for name, grad in _gradients(shorter, weight * plain).items():
            wanted[name] = wanted[name] + grad if name in wanted else grad
        shown = loss.total if layers == LAYERS else loss.metrics[f"exit_{layers}_loss"][0]
        torch.testing.assert_close(shown, plain, rtol=1e-5, atol=1e-5)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    assert float(loss.metrics["exit_1_loss"][1]) == int((batch["targets"] != IGNORED).sum())


def test_an_exit_learns_from_a_teacher_as_the_last_layer_does() -> None:
    """With the teacher alone, an exit whose weight is 1 gets the gradients of a student that ends there."""
    teacher, batch = _model(num_hidden_layers=2, initializer_range=0.2), _batch()
    spec, exits = DistillSpec(teacher="/teacher", alpha=1.0), ExitsSpec(layers=(2,), loss_weights=(1.0,))
    model, whole, shorter = _model(exits=exits), _model(), _model(num_hidden_layers=2)
    for other in (whole, shorter):
        other.load_state_dict(model.state_dict(), strict=False)
    loss = Distillation(LanguageModeling(), teacher, spec, exits).loss(model, batch)
    alone, of_exit = (Distillation(LanguageModeling(), teacher, spec).loss(each, batch) for each in (whole, shorter))
    torch.testing.assert_close(loss.total, alone.total)
    torch.testing.assert_close(loss.metrics["exit_2_loss"], of_exit.metrics["cross_entropy"])
    found, *parts = (_gradients(each, of.total) for each, of in ((model, loss), (whole, alone), (shorter, of_exit)))
    for name in parts[1]:
        torch.testing.assert_close(found[name], parts[0][name] + parts[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_micro_batch_without_rows_has_gradients_of_zero() -> None:
    model = _model(exits=EXITS)
    empty = {name: tensor[:0] for name, tensor in _batch().items()}
    loss = ExitLosses(LanguageModeling(), EXITS).loss(model, empty)
    assert all(not grad.any() for grad in _gradients(model, loss.total).values())
    assert [float(each) for pair in loss.metrics.values() for each in pair] == [0.0] * 4
