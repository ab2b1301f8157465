"""Symmetric integers, against compressed-tensors, and products of rounded operands."""

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

from orchestrator.model.linear.fake_quant import FakeQuantizer, use_fake_quantization
from orchestrator.model.linear.integers import dequantized, quantized, rounded
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.spec.pretrained.lora import LoraSpec
from orchestrator.spec.quantization import QuantizationSpec

COUNTS = (5, 0, 9, 3)


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _through(values: torch.Tensor, bits: int | None, size: int | None = None) -> torch.Tensor:
    """Rounded values, with the gradient of the values."""
    return values if bits is None else values + (rounded(values, bits, size) - values).detach()


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_integers_are_those_of_compressed_tensors(num_bits: int, group_size: int | None) -> None:
    values_NK = _values(24, 64)
    strategy = QuantizationStrategy.CHANNEL if group_size is None else QuantizationStrategy.GROUP
    args = QuantizationArgs(num_bits=num_bits, strategy=strategy, group_size=group_size)
    grouped = values_NK.view(24, -1, group_size or 64)
    scales_NG, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    if group_size is not None:
        scales_NG = scales_NG.bfloat16().float()
    integers_NK, found_NG = quantized(values_NK, num_bits, group_size)
    assert torch.equal(found_NG, scales_NG)
    assert torch.equal(integers_NK, quantize(values_NK, scales_NG, None, args, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_is_what_the_integers_stand_for(dtype: torch.dtype) -> None:
    values = _values(3, 5, 32).to(dtype)
    values[1, 2] = 0.0
    for num_bits, group_size in ((8, None), (4, 8)):
        integers, scales = quantized(values, num_bits, group_size)
        found = rounded(values, num_bits, group_size)
        assert found.dtype is dtype and torch.equal(found, dequantized(integers, scales).to(dtype))
        assert integers.int().abs().max() <= 2 ** (num_bits - 1) and not found[1, 2].any()
        error = (dequantized(integers, scales) - values.float()).abs().max()
        assert error <= values.float().abs().max() / (2**num_bits - 1) * 1.02
    assert rounded(torch.empty(0, 32), 8).shape == (0, 32)
    zeros = _values(4, 16) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(4)
    assert ((rounded(zeros, 4, 8) == 0) >= (zeros == 0)).all()  # 2:4 stays 2:4


def test_a_value_that_is_no_number_makes_its_row_none() -> None:
    values = _values(2, 8)
    values[1, 3] = torch.inf
    found = rounded(values, 8)
    assert found[0].isfinite().all() and found[1].isnan().any()


@pytest.mark.parametrize("input_bits", [None, 8])
@pytest.mark.parametrize("rank", [0, 3])
def test_experts_and_gradients_are_those_by_rounded_operands(input_bits: int | None, rank: int) -> None:
    """Of the grouped computation against products of the formula that autograd differentiates."""
    quantizer, lora = FakeQuantizer(4, 8, input_bits), LoraSpec(r=3, target_modules=("gate_proj", "up_proj"))
    experts = [GatedMLP(16, 24) for _ in COUNTS]
    x_ND, gates_R = _values(12, 16, seed=5), _values(sum(COUNTS), seed=6).abs()
    token_R = torch.randint(0, 12, (sum(COUNTS),), generator=torch.Generator().manual_seed(7))
    for number, expert in enumerate(experts):
        if rank:
            expert.add_adapters(lora)
        for place, param in enumerate(expert.parameters()):
            param.data = _values(*param.shape, seed=10 * number + place)
        expert.quantized = {"gate_up": quantizer, "down": quantizer}
    weights = [param for expert in experts for param in expert.parameters()]

    x_ND.requires_grad_()
    y_ND = run_experts(x_ND, token_R, torch.tensor(COUNTS), experts, gates_R)
    found = torch.autograd.grad(y_ND.square().sum(), [x_ND, *weights])

    wanted_ND, begin = torch.zeros(12, 16), 0
    for expert, count in zip(experts, COUNTS, strict=True):
        copies = slice(begin, begin + count)
        whole = {n: getattr(expert, n) for n in ("gate_up", "down")}
        whole |= {name: adapter.merged(whole[name]) for name, adapter in expert.adapters.items()}
        gate_up, down = (_through(whole[name], 4, 8) for name in ("gate_up", "down"))
        gate, up = F.linear(_through(x_ND[token_R[copies]], input_bits), gate_up).chunk(2, -1)
        inner = F.silu(gate) * up * gates_R[copies, None]
        wanted_ND = wanted_ND.index_add(0, token_R[copies], F.linear(_through(inner, input_bits), down))
        begin += count
    wanted = torch.autograd.grad(wanted_ND.square().sum(), [x_ND, *weights])
    torch.testing.assert_close(y_ND, wanted_ND, rtol=1e-4, atol=1e-3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("input_bits", [None, 8])
@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_of_dense_products_are_those_by_rounded_operands(input_bits: int | None, rank: int) -> None:
    mlp, x_BTD = GatedMLP(16, 24), _values(2, 5, 16, seed=5).requires_grad_()
    if rank:
        mlp.add_adapters(LoraSpec(r=rank, target_modules=("gate_proj", "up_proj", "down_proj")))
    for place, param in enumerate(mlp.parameters()):
        param.data = _values(*param.shape, seed=place)
    weights = list(mlp.parameters())
    mlp.quantized = dict.fromkeys(("gate_up", "down"), FakeQuantizer(4, 8, input_bits))
    y_BTD = mlp(x_BTD)
    found = torch.autograd.grad(y_BTD.square().sum(), [x_BTD, *weights])

    whole = {name: getattr(mlp, name) for name in ("gate_up", "down")}
    whole |= {name: adapter.merged(whole[name]) for name, adapter in mlp.adapters.items()}
    gate, up = F.linear(_through(x_BTD, input_bits), _through(whole["gate_up"], 4, 8)).chunk(2, -1)
    wanted_BTD = F.linear(_through(F.silu(gate) * up, input_bits), _through(whole["down"], 4, 8))
    torch.testing.assert_close(y_BTD, wanted_BTD, rtol=1e-4, atol=1e-3)
    for one, other in zip(found, torch.autograd.grad(wanted_BTD.square().sum(), [x_BTD, *weights]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6)


def test_only_what_is_named_is_rounded() -> None:
    mlp = torch.nn.ModuleDict({"mlp": GatedMLP(16, 24)})
    for param in mlp.parameters():
        param.data = _values(*param.shape)
    x_ND = _values(3, 16)
    plain = mlp["mlp"](x_ND)
    use_fake_quantization(mlp, QuantizationSpec(weight_dtype="int4", activation_dtype=None, params=("*.down",)))
    inner = mlp["mlp"].inner(x_ND)
    assert torch.equal(mlp["mlp"](x_ND), F.linear(inner, rounded(mlp["mlp"].down, 4)))
    assert not torch.equal(mlp["mlp"](x_ND), plain)
