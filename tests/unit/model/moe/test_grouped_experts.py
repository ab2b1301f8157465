"""Experts by grouped products against experts one by one."""

import pytest
import torch
from torch import Tensor

from orchestrator.model.moe import grouped_experts
from orchestrator.model.moe.experts import GatedMLP, run_experts
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

TOKENS, HIDDEN, INNER = 9, 16, 24


class _Sink:
    """Adds up a gradient in fp32."""

    def __init__(self, weight: Tensor) -> None:
        self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, grad: Tensor) -> None:
        self.total += grad

    def add_product(self, left: Tensor, right: Tensor) -> None:
        self.total += left @ right


def _case(counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[GatedMLP], Tensor]:
    generator, device = torch.Generator().manual_seed(5), devices.device()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    experts = [GatedMLP(HIDDEN, INNER).to(device, dtype) for _ in counts]
    with torch.no_grad():
        for param in (param for expert in experts for param in expert.parameters()):
            param.copy_(0.5 * drawn(*param.shape))
    token_R = torch.randint(0, TOKENS, (sum(counts),), generator=generator).to(device)
    gates_R = drawn(sum(counts)).sigmoid().requires_grad_()
    return drawn(TOKENS, HIDDEN).requires_grad_(), token_R, torch.tensor(counts, device=device), experts, gates_R


def _grouped(
    x_ND: Tensor, token_R: Tensor, counts_L: Tensor, experts: list[GatedMLP], gates_R: Tensor | None
) -> Tensor:
    gate_ups, downs = [expert.gate_up for expert in experts], [expert.down for expert in experts]
    return grouped_experts.run(x_ND, token_R, counts_L, gate_ups, downs, gates_R)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("counts", [[4, 5, 3], [0, 12, 0], [8, 0, 9], [0, 0], [7]], ids=str)
def test_outputs_and_gradients_equal_those_of_experts_one_by_one(counts: list[int], gated: bool) -> None:
    found = []
    for run in (run_experts, _grouped):  # fp32, which only the first runs on a GPU
        x_ND, token_R, counts_L, experts, gates_R = _case(counts, torch.float32)
        wanted = [x_ND, *([gates_R] if gated else []), *(p for e in experts for p in e.parameters())]
        y_ND = run(x_ND, token_R, counts_L, experts, gates_R if gated else None)
        found.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), wanted)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_sinks_get_all_gradients_and_autograd_none() -> None:
    counts = [4, 0, 5]
    x_ND, token_R, counts_L, experts, gates_R = _case(counts, torch.bfloat16)
    _grouped(x_ND, token_R, counts_L, experts, gates_R).square().sum().backward()
    params = [param for expert in experts for param in expert.parameters()]
    wanted = [param.grad for param in params]
    for param in params:
        param.grad = None
        param.gradient_sink = _Sink(param)  # type: ignore[attr-defined]
    _grouped(x_ND, token_R, counts_L, experts, gates_R).square().sum().backward()
    assert all(param.grad is None for param in params)
    for param, grad in zip(params, wanted, strict=True):
        assert torch.equal(param.gradient_sink.total, grad.float())


def test_kernels_get_what_they_take() -> None:
    x_ND, _, _, experts, _ = _case([1, 1], torch.bfloat16)
    weights = [expert.gate_up for expert in experts]
    on_gpu = devices.device().type == "cuda"
    assert grouped_experts.can_run(x_ND, weights) == on_gpu
    assert not grouped_experts.can_run(x_ND.float(), weights)
    assert not grouped_experts.can_run(x_ND, [weights[0], weights[0]])  # an expert's batches apart
    assert not grouped_experts.can_run(x_ND, [])
    assert not grouped_experts.can_run(x_ND[:, :12], [weight[:, :12] for weight in weights])
    assert not grouped_experts.can_run(x_ND, [weight[: 2 * (INNER - 4)] for weight in weights])


@pytest.mark.off_cpu
def test_bf16_takes_them_and_gives_nearly_what_fp32_gives() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x_ND, token_R, counts_L, experts, gates_R = _case([4, 0, 5], dtype)
        y_ND = run_experts(x_ND, token_R, counts_L, experts, gates_R)
        found.append(y_ND.float())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.3)


def test_weights_at_equal_distances_in_memory_are_not_copied() -> None:
    flat = torch.arange(4 * 48, dtype=torch.bfloat16, device=devices.device())
    weights = [flat[48 * n + 8 : 48 * n + 40].view(4, 8) for n in range(4)]
    together = grouped_experts.stacked(weights)
    assert together.data_ptr() == weights[0].data_ptr() and together.shape == (4, 4, 8)
    assert torch.equal(together, torch.stack(weights))
    (alone,) = [grouped_experts.stacked(weights[2:3])]
    assert alone.data_ptr() == weights[2].data_ptr() and torch.equal(alone[0], weights[2])


@pytest.mark.parametrize(
    "offsets",
    [(0, 32, 96), (64, 32, 0), (4, 36, 68), (0, 36, 72), (0, 16, 32)],
    ids=["gap", "back", "odd", "step", "in"],
)
def test_weights_at_other_distances_are_copied(offsets: tuple[int, ...]) -> None:
    flat = torch.arange(128, dtype=torch.bfloat16, device=devices.device())
    weights = [flat[at : at + 32].view(4, 8) for at in offsets]
    together = grouped_experts.stacked(weights)
    assert together.data_ptr() not in [weight.data_ptr() for weight in weights]
    assert torch.equal(together, torch.stack(weights))
    apart = [weight.clone() for weight in weights]
    assert torch.equal(grouped_experts.stacked(apart), torch.stack(apart))
