"""Products in float8 against those in fp32, within the error of the formats."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.model.factory import single_rank
from orchestrator.model.linear.float8 import GRADIENTS, VALUES, linear, mm, use_float8
from orchestrator.model.moe.experts import GatedMLP, run_experts
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

ROUNDING = {VALUES: 2.0**-4, GRADIENTS: 2.0**-3}  # largest relative error of a number that isn't subnormal
SUBNORMAL = {VALUES: 2.0**-10, GRADIENTS: 2.0**-17}  # largest error of one that is


def _drawn(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(devices.device())


def _error(found: Tensor, wanted: Tensor) -> float:
    """The error's norm, relative."""
    return float((found - wanted).norm() / wanted.norm())


def _rounding(x_PQ: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of each element."""
    smallest = SUBNORMAL[dtype] * x_PQ.abs().max() / torch.finfo(dtype).max
    return torch.maximum(x_PQ.abs() * ROUNDING[dtype], smallest.expand_as(x_PQ))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("of_gradient", [False, True], ids=["values", "gradient"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (16, 32, 48), (33, 130, 17)], ids=str)
def test_a_product_is_as_near_as_the_rounding_of_its_factors(
    sizes: tuple[int, int, int], of_gradient: bool, scale: float
) -> None:
    M, K, N = sizes
    left, right = _drawn(M, K, scale=scale), _drawn(K, N, seed=2)
    found = mm(left, right, of_gradient=of_gradient)
    left_error, right_error = _rounding(left, GRADIENTS if of_gradient else VALUES), _rounding(right, VALUES)
    most = left_error @ right.abs() + left.abs() @ right_error + left_error @ right_error
    assert found.dtype == left.dtype and found.shape == (M, N)
    assert bool(((found - left @ right).abs() <= most * 1.01).all())
    assert (M, K, N) == (1, 1, 1) or _error(found, left @ right) > 1e-3  # so it was in float8
    written = torch.empty_like(found)
    assert mm(left, right, out=written, of_gradient=of_gradient) is written and torch.equal(written, found)


def test_factors_may_be_column_major() -> None:
    left, right = _drawn(20, 9), _drawn(6, 20, seed=2)
    assert torch.equal(mm(left.t(), right.t()), mm(left.t().contiguous(), right.t().contiguous()))


def test_zeros_and_nothing_have_products() -> None:
    assert not mm(torch.zeros_like(_drawn(4, 5)), _drawn(5, 3)).any()
    for M, K, N in ((0, 5, 3), (4, 0, 3), (4, 5, 0)):
        found = mm(_drawn(M, K), _drawn(K, N))
        assert found.shape == (M, N) and not found.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_shows_in_every_product(value: float) -> None:
    left = _drawn(4, 5)
    left[1, 2] = value
    assert bool(mm(left, _drawn(5, 3)).isnan().all()) and bool(mm(_drawn(3, 4), left).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 24), (40, 24), (0, 24), (2, 0, 24)], ids=str)
def test_a_linear_layer_has_outputs_and_gradients_near_those_in_full(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    results = []
    for function in (linear, F.linear):
        x, weight = _drawn(*shape).to(dtype).requires_grad_(), _drawn(9, 24, seed=2).to(dtype).requires_grad_()
        bias = _drawn(9, seed=3).to(dtype).requires_grad_()
        y = function(x, weight, bias)
        (y * _drawn(*y.shape, seed=4).to(dtype)).sum().backward()
        assert x.grad is not None and weight.grad is not None and bias.grad is not None
        results.append((y.detach(), x.grad, weight.grad, bias.grad))
    for found, wanted in zip(*results, strict=True):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert not wanted.numel() or _error(found, wanted) < 0.1 or not wanted.any()


def test_a_weight_that_is_not_trained_has_no_gradient() -> None:
    x, weight = _drawn(3, 4).requires_grad_(), _drawn(2, 4, seed=2)
    linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


class _Sink:
    """Accumulates a gradient, as an engine's bucket does."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, grad: Tensor) -> None:
        self.total = grad if self.total is None else self.total + grad

    def add_product(self, left: Tensor, right: Tensor) -> None:
        raise AssertionError("a product in float8 is not the sink's")


@pytest.mark.parametrize("has_sinks", [False, True], ids=["autograd", "sinks"])
def test_experts_are_near_those_in_full_also_without_tokens(has_sinks: bool) -> None:
    counts = torch.tensor([5, 0, 19], device=devices.device())
    token_R = torch.randint(0, 11, (24,), generator=torch.Generator().manual_seed(6)).to(devices.device())
    results: list[list[Tensor]] = []
    for in_float8 in (True, False):
        with devices.device():
            experts = [GatedMLP(12, 10) for _ in range(3)]
        for seed, expert in enumerate(experts):
            for param in expert.parameters():
                param.data.copy_(_drawn(*param.shape, seed=seed, scale=0.3))
                if has_sinks and in_float8:
                    param.gradient_sink = _Sink()  # type: ignore[attr-defined]
            if in_float8:
                use_float8(expert)
        x_ND, gates_R = _drawn(11, 12).requires_grad_(), _drawn(24, seed=5).sigmoid().requires_grad_()
        y_ND = run_experts(x_ND, token_R, counts, experts, gates_R)
        (y_ND * _drawn(11, 12, seed=7)).sum().backward()
        params = [param for expert in experts for param in expert.parameters()]
        grads: list[Any] = [p.gradient_sink.total if hasattr(p, "gradient_sink") else p.grad for p in params]
        results.append([y_ND.detach(), x_ND.grad, gates_R.grad, *grads])  # type: ignore[list-item]
    for found, wanted in zip(*results, strict=True):
        if wanted.any():
            assert 1e-3 < _error(found, wanted) < 0.15
        else:
            assert found is None or not found.any()  # an expert without tokens


class _Products(TorchDispatchMode):
    """Counts products by operation, and has the shapes of the second factors of those in full."""

    def __init__(self) -> None:
        super().__init__()
        self.num_scaled, self.in_full = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.num_scaled += name == "_scaled_mm"
        if name in ("mm", "addmm"):
            self.in_full |= set(args[-1].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.on_cpu
def test_routers_and_the_head_are_computed_in_full() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 24}
    experts, vocab = 5, 37
    spec = ModelSpec(n_routed_experts=experts, num_hidden_layers=2, intermediate_size=48, **sizes)  # type: ignore[arg-type]
    model = MoELanguageModel(spec, vocab, single_rank(spec))
    model.init_weights(0)
    use_float8(model)
    tokens_BT = torch.randint(0, vocab, (2, 6), generator=torch.Generator().manual_seed(1))
    with _Products() as products:
        logits_BTV = model(tokens_BT)
    of_block, of_mlp, of_expert = 4, 2, 2
    with_tokens = int((model.moe_layers[0].last_counts_E > 0).sum())
    # The first block has an MLP, the second one shared experts, which are one.
    assert products.num_scaled == 2 * of_block + 2 * of_mlp + of_expert * with_tokens
    assert products.in_full == {16, experts, vocab}
    assert logits_BTV.isfinite().all()
