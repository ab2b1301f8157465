"""Distillation against torch's own divergence, and what it counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.model.base import TokenScores, TrainableModel
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED, chunked_loss
from orchestrator.model.tasks.distillation import (
    Distillation,
    DistillationLoss,
    FullDistribution,
    TopKDistribution,
    top_k_distribution,
)
from orchestrator.model.tasks.language_modeling import LanguageModeling
from orchestrator.spec.distill import DistillSpec
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

N, D, V = 50, 12, 40
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SMALL = ModelSpec(**SIZES)


def _model(spec: ModelSpec = SMALL, seed: int = 0) -> TrainableModel:
    with devices.device():
        model = build_model(spec, V, single_rank(spec))
    model.init_weights(seed)
    return model


def _task(teacher: TrainableModel, **keys: Any) -> Distillation:
    return Distillation(LanguageModeling(), teacher, DistillSpec(teacher="/teacher", **keys))


def _batch(rows: int = 3, lengths: list[int] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (rows, 11), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[:, 4] = IGNORED
    if lengths is None:
        return {"inputs": inputs.to(devices.device()), "targets": targets.to(devices.device())}
    lengths_B = torch.tensor(lengths)
    targets[torch.arange(10) >= lengths_B[:, None]] = IGNORED
    batch = {"inputs": inputs, "targets": targets, "lengths": lengths_B}
    return {name: tensor.to(devices.device()) for name, tensor in batch.items()}


def _drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(devices.device())


def _predicted(logits_NV: Tensor, temperature: float) -> FullDistribution:
    return FullDistribution(TokenScores(logits_NV, None, None), temperature)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (3.0, 0.3), (2.0, 1.0)])
def test_values_and_gradients_equal_those_of_torch(chunk: int, temperature: float, alpha: float) -> None:
    x_ND, head_VD = _drawn(N, D, seed=0).requires_grad_(), _drawn(V, D, seed=1).requires_grad_()
    taught_NV = _drawn(N, V, seed=2) * 3
    targets_N = (torch.arange(N) % V).to(devices.device())
    targets_N[::7] = IGNORED
    loss = DistillationLoss(targets_N, _predicted(taught_NV, temperature), temperature, alpha)
    total, sums_S = chunked_loss(x_ND, head_VD, loss, chunk)
    found = torch.autograd.grad(total / 3, (x_ND, head_VD))

    logits_NV = F.linear(x_ND, head_VD)
    cross_entropy = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
    counted = targets_N != IGNORED
    of_student, of_teacher = ((each[counted] / temperature).log_softmax(-1) for each in (logits_NV, taught_NV))
    divergence = F.kl_div(of_student, of_teacher, log_target=True, reduction="sum")
    wanted = (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence
    torch.testing.assert_close(sums_S, torch.stack((wanted, cross_entropy, divergence)).detach(), rtol=1e-5, atol=0.0)
    for ours, theirs in zip(found, torch.autograd.grad(wanted / 3, (x_ND, head_VD)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_that_returns_logits_gets_the_same_gradients() -> None:
    x_ND, head_VD = _drawn(N, D, seed=0).requires_grad_(), _drawn(V, D, seed=1)
    targets_N = torch.zeros(N, dtype=torch.int64, device=x_ND.device)
    loss = DistillationLoss(targets_N, _predicted(_drawn(N, V, seed=2), 2.0), 2.0, 0.5)
    of_hidden = torch.autograd.grad(chunked_loss(x_ND, head_VD, loss, 8)[0], x_ND)
    logits_NV = F.linear(x_ND, head_VD)
    of_logits = torch.autograd.grad(chunked_loss(logits_NV, None, loss, 8)[0], x_ND)
    torch.testing.assert_close(of_hidden, of_logits, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    model, batch = _model(), _batch()
    loss = _task(model, alpha=0.25, hidden_weight=1.0).loss(_model(), batch)
    plain = LanguageModeling().loss(_model(), batch).total
    torch.testing.assert_close(loss.total, 0.75 * plain, rtol=1e-5, atol=1e-4)
    for name in ("teacher_divergence", "hidden_distance"):
        assert abs(float(loss.metrics[name][0])) < 1e-4 and float(loss.metrics[name][1]) == 27


def test_validation_shows_the_loss_of_the_task() -> None:
    model, batch = _model().eval(), _batch(lengths=[10, 3, 6])
    task = _task(_model(seed=1), alpha=1.0)
    with torch.no_grad():
        loss, plain = task.loss(model, batch), LanguageModeling().loss(model, batch)
    torch.testing.assert_close(loss.total, plain.total, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(loss.metrics["cross_entropy"][0], plain.total, rtol=1e-5, atol=0.0)
    assert float(loss.metrics["teacher_divergence"][0]) > 0.01
    assert task.report({"cross_entropy": 2.0}) == {"cross_entropy": 2.0}


@pytest.mark.parametrize("hidden_weight", [0.0, 2.0])
def test_gradients_reach_the_student_alone(hidden_weight: float) -> None:
    student, teacher = _model(), _model(ModelSpec(**SIZES | {"num_hidden_layers": 3}), seed=1).requires_grad_(False)
    task = _task(teacher, alpha=1.0, hidden_weight=hidden_weight)
    loss = task.loss(student, _batch())
    loss.total.backward()
    assert tuple(loss.metrics) == task.metrics
    assert all(p.grad is None for p in teacher.parameters())
    grads = {name: p.grad for name, p in student.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    distance, weight = loss.metrics.get("hidden_distance", (None, None))
    assert (distance is None) == (hidden_weight == 0.0)
    if distance is not None and weight is not None:
        assert 0.0 < float(distance) <= 2.0 * float(weight)


def test_what_is_padding_is_not_learned() -> None:
    """Rows of unequal length have the loss of the same rows one by one."""
    student, task = _model(), _task(_model(seed=1), hidden_weight=0.5)
    lengths = [10, 3, 6]
    whole = task.loss(student, _batch(lengths=lengths))
    batch, total = _batch(lengths=lengths), 0.0
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in batch.items() if name != "lengths"}
        total += float(task.loss(student, alone).total)
    assert abs(float(whole.total) - total) < 1e-3


def test_no_rows_have_no_loss_but_gradients() -> None:
    student = _model()
    loss = _task(_model(seed=1), hidden_weight=1.0).loss(student, _batch(rows=0))
    loss.total.backward()
    assert float(loss.total) == 0.0 and all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_a_kept_prediction_is_compared_with_its_rest_as_one_token() -> None:
    """Values and gradients against the divergence of K + 1 classes, made by autograd."""
    taught_NV, heat = _drawn(N, V, seed=2) * 3, 2.0
    kept = TopKDistribution(*top_k_distribution(TokenScores(taught_NV, None, None), 5, heat))
    logits_NV = _drawn(N, V, seed=3).requires_grad_()
    divergence_N1, d_NV = kept.compare((logits_NV / heat).log_softmax(-1).detach(), slice(0, N))

    student_NV, teacher_NV = (logits_NV / heat).softmax(-1), (taught_NV / heat).softmax(-1)
    top_NK = teacher_NV.topk(5, dim=-1).indices
    torch.testing.assert_close(kept.ids_NK, top_NK)

    def classes(share_NV: Tensor) -> Tensor:
        of_top_NK = share_NV.gather(1, top_NK)
        return torch.cat((of_top_NK, 1.0 - of_top_NK.sum(-1, keepdim=True)), dim=-1).log()

    wanted_NC = F.kl_div(classes(student_NV), classes(teacher_NV), log_target=True, reduction="none")
    torch.testing.assert_close(divergence_N1[:, 0], wanted_NC.sum(-1), rtol=1e-3, atol=1e-4)
    (of_logits,) = torch.autograd.grad(wanted_NC.sum(), logits_NV)
    torch.testing.assert_close(d_NV / heat, of_logits, rtol=1e-3, atol=1e-4)


def test_a_kept_prediction_of_a_student_that_is_sure_has_finite_gradients() -> None:
    ids = torch.tensor([[0, 1]], device=devices.device())
    kept = TopKDistribution(ids, torch.log(torch.tensor([[0.5, 0.3]], device=ids.device)), torch.log(ids[:, 0] + 0.2))
    logits_1V = torch.zeros(1, V, device=ids.device)
    logits_1V[0, 0] = 300.0
    divergence_11, d_1V = kept.compare(logits_1V.log_softmax(-1), slice(0, 1))
    assert divergence_11.isfinite().all() and d_1V.isfinite().all()
    assert abs(float(d_1V.sum())) < 1e-5 and float(d_1V[0, 0]) == pytest.approx(0.5)


def test_a_kept_prediction_of_almost_all_tokens_teaches_as_the_whole_one() -> None:
    student, teacher, batch = _model(), _model(seed=1), _batch()
    spec = DistillSpec(logits="/logits", alpha=0.7)
    with torch.no_grad():
        scores = teacher.scores(batch["inputs"])
    ids_NK, logs_NK, rest_N = top_k_distribution(scores, V - 1, spec.temperature)
    B, T = batch["inputs"].shape
    kept = {"teacher_ids": ids_NK.view(B, T, -1), "teacher_logs": logs_NK.view(B, T, -1)}
    kept["teacher_rest"] = rest_N.view(B, T)
    found = Distillation(LanguageModeling(), None, spec).loss(student, batch | kept)
    wanted = _task(teacher, alpha=0.7).loss(student, batch)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-4, atol=1e-3)
    params = list(student.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(each.total, params) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
