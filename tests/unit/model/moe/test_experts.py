"""Many experts at once against one after the other by plain autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from orchestrator.model.moe import experts as module
from orchestrator.model.moe.experts import GatedMLP, run_experts
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

TOKENS, HIDDEN, INNER = 9, 6, 10


def _drawn(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(devices.device())


def _counts(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64, device=devices.device())


def _experts(count: int) -> list[GatedMLP]:
    generator = torch.Generator().manual_seed(3)
    experts = [GatedMLP(HIDDEN, INNER).double() for _ in range(count)]
    with torch.no_grad():
        for expert in experts:
            for param in expert.parameters():
                param.normal_(0.0, 0.5, generator=generator)
    return [expert.to(devices.device()) for expert in experts]


def _one_by_one(
    x_ND: Tensor, token_R: Tensor, counts_L: Tensor, experts: list[GatedMLP], gates_R: Tensor | None
) -> Tensor:
    y_ND, start = torch.zeros_like(x_ND), 0
    for expert, count in zip(experts, counts_L.tolist(), strict=True):
        for copy in range(start, start + count):
            gate = 1.0 if gates_R is None else gates_R[copy]
            y_ND = y_ND.index_add(0, token_R[copy : copy + 1], gate * expert(x_ND[token_R[copy], None]))
        start += count
    return y_ND


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("counts", [[4, 5, 3], [0, 12, 0], [1, 0, 2]], ids=str)
def test_outputs_and_gradients_equal_those_of_experts_run_one_by_one(counts: list[int], gated: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = _experts(len(counts))
    copies = sum(counts)
    x_ND = _drawn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    token_R = torch.randint(0, TOKENS, (copies,), generator=generator).to(devices.device())
    gates_R = _drawn(copies, generator=generator).sigmoid().requires_grad_() if gated else None
    wanted = [x_ND, *([gates_R] if gates_R is not None else []), *(p for e in experts for p in e.parameters())]
    weights_ND = _drawn(TOKENS, HIDDEN, generator=generator)
    found = []
    for run in (run_experts, _one_by_one):
        y_ND = run(x_ND, token_R, _counts(*counts), experts, gates_R)
        grads = torch.autograd.grad((y_ND * weights_ND).sum(), wanted, allow_unused=True, materialize_grads=True)
        found.append([y_ND, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 2 * INNER * 7, 1 << 20], ids=["each by itself", "some", "all"])
def test_how_many_experts_are_computed_at_once_changes_no_bit(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [3, 0, 4, 5, 0]
    generator = torch.Generator().manual_seed(7)
    x_ND = _drawn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    token_R = torch.randint(0, TOKENS, (sum(counts),), generator=generator).to(devices.device())
    gates_R = _drawn(sum(counts), generator=generator).sigmoid().requires_grad_()
    found = []
    for most in (1 << 30, at_once):
        monkeypatch.setitem(module.AT_ONCE, devices.device().type, most)
        experts = _experts(len(counts))
        wanted = [x_ND, gates_R, *(p for e in experts for p in e.parameters())]
        y_ND = run_experts(x_ND, token_R, _counts(*counts), experts, gates_R)
        found.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), wanted)])
    for together, apart in zip(*found, strict=True):
        assert torch.equal(together, apart)


def test_a_gradient_sink_gets_all_factors_and_autograd_no_gradient() -> None:
    counts_L, experts = _counts(4, 0, 5), _experts(3)
    x_ND = _drawn(TOKENS, HIDDEN)
    run_experts(x_ND, torch.arange(TOKENS, device=devices.device()), counts_L, experts).square().sum().backward()
    params = [p for e in experts for p in e.parameters()]
    wanted = [p.grad for p in params]
    got = [torch.zeros_like(p) for p in params]
    for param, total in zip(params, got, strict=True):
        param.grad = None
        param.gradient_sink = SimpleNamespace(add_product=total.addmm_)  # type: ignore[attr-defined]
    run_experts(x_ND, torch.arange(TOKENS, device=devices.device()), counts_L, experts).square().sum().backward()
    assert all(p.grad is None for p in params)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_experts_or_copies_there_are_zeros() -> None:
    x_ND = torch.ones(3, HIDDEN, dtype=torch.float64, device=devices.device(), requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64, device=devices.device())
    experts = _experts(2)
    assert torch.equal(run_experts(x_ND, nothing, nothing, []), torch.zeros_like(x_ND))
    run_experts(x_ND, nothing, _counts(0, 0), experts).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for e in experts for p in e.parameters())


def test_only_the_inner_activations_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.dtype == torch.float64 else 0)
        return tensor

    experts = _experts(3)
    x_ND = _drawn(TOKENS, HIDDEN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_experts(x_ND, torch.arange(TOKENS, device=devices.device()), _counts(3, 3, 3), experts)
    weights = sum(p.numel() for e in experts for p in e.parameters())
    assert sum(kept) == x_ND.numel() + weights + TOKENS * 2 * INNER
