"""The mixture-of-experts layer in a world of one against a loop over tokens, and who sends to whom in larger worlds."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.elastic.placement import Placement
from orchestrator.model.experts import GatedMLP
from orchestrator.model.moe import ExpertHome, MoELayer, _expected, expert_major
from orchestrator.spec.model import ModelSpec

HIDDEN, INNER = 6, 10


def _layer(num_experts: int = 5, top_k: int = 2, num_shared_experts: int = 1) -> MoELayer:
    home = ExpertHome(Placement.balanced(num_experts, 1), 0, None)
    spec = ModelSpec(
        hidden_size=HIDDEN,
        num_heads=1,
        num_kv_heads=1,
        expert_intermediate_size=INNER,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        routed_scaling_factor=1.5,
    )
    layer = MoELayer(spec, home)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(0.0, 0.5, generator=generator)
    return layer.double()


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def _mlp(mlp: GatedMLP, x_D: Tensor) -> Tensor:
    gate_H, up_H = (mlp.gate_up @ x_D).chunk(2)
    return mlp.down @ (F.silu(gate_H) * up_H)


def _token_by_token(layer: MoELayer, x_BTD: Tensor) -> Tensor:
    """What the layer is defined to compute, one token and one expert at a time."""
    rows = []
    for x_D in x_BTD.reshape(-1, HIDDEN):
        routing = layer.router(x_D[None])
        y_D = torch.zeros_like(x_D) if layer.shared is None else _mlp(layer.shared, x_D)
        for expert, gate in zip(routing.expert_ids_NK[0].tolist(), routing.gates_NK[0], strict=True):
            mlp = layer.experts[str(expert)]
            assert isinstance(mlp, GatedMLP)
            y_D = y_D + gate * _mlp(mlp, x_D)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


def _gradients(layer: MoELayer, y_BTD: Tensor, x_BTD: Tensor) -> dict[str, Tensor]:
    weights_BTD = torch.arange(y_BTD.numel(), dtype=torch.float64).view_as(y_BTD).cos()
    named = dict(layer.named_parameters())
    found = torch.autograd.grad((y_BTD * weights_BTD).sum(), [x_BTD, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_shared_experts"),
    [
        pytest.param(5, 2, 1, id="one shared expert"),
        pytest.param(5, 3, 2, id="two shared experts"),
        pytest.param(4, 1, 0, id="no shared expert"),
        pytest.param(3, 3, 1, id="every expert chosen"),
    ],
)
def test_outputs_and_gradients_equal_those_of_a_loop_over_tokens(
    num_experts: int, top_k: int, num_shared_experts: int
) -> None:
    layer = _layer(num_experts, top_k, num_shared_experts)
    x_BTD = _tokens(2, 7).requires_grad_()
    y_BTD, wanted_BTD = layer(x_BTD), _token_by_token(layer, x_BTD)
    # Scores and gates are fp32 by design, in both; the rest is fp64.
    torch.testing.assert_close(y_BTD, wanted_BTD, rtol=1e-6, atol=1e-9)
    ours, theirs = _gradients(layer, y_BTD, x_BTD), _gradients(layer, wanted_BTD, x_BTD)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_every_copy_is_counted_for_its_expert() -> None:
    layer, x_BTD = _layer(), _tokens(3, 9)
    layer(x_BTD)
    chosen = layer.router(x_BTD.reshape(-1, HIDDEN)).expert_ids_NK.reshape(-1).tolist()
    assert layer.last_counts_E.tolist() == [Counter(chosen)[expert] for expert in range(5)]
    assert layer.last_counts_E.dtype == torch.int64


def test_an_expert_that_no_token_chose_has_gradients_of_zero() -> None:
    layer = _layer()
    layer.router.correction_bias_E[4] = -10.0
    layer(_tokens(1, 8)).sum().backward()
    for name, param in layer.named_parameters():
        assert param.grad is not None, name
        idle = name.startswith("experts.4.")
        assert bool((param.grad == 0).all()) == idle, name


def test_no_rows_give_no_rows_and_gradients_of_zero() -> None:
    layer = _layer()
    y_BTD = layer(_tokens(0, 8))
    assert y_BTD.shape == (0, 8, HIDDEN)
    assert layer.last_counts_E.tolist() == [0] * 5
    y_BTD.sum().backward()
    assert all(param.grad is not None and bool((param.grad == 0).all()) for param in layer.parameters())


@st.composite
def _placements(draw: st.DrawFn) -> Placement:
    world_size = draw(st.integers(1, 5))
    ranks = st.sets(st.integers(0, world_size - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    holders = draw(st.lists(ranks, min_size=1, max_size=6))
    return Placement(len(holders), world_size, tuple(holders))


@given(_placements())
def test_tokens_go_to_a_holder_and_stay_home_where_they_can(placement: Placement) -> None:
    for rank in range(placement.world_size):
        destination_E = ExpertHome(placement, rank, None).destinations()
        for expert, holders in enumerate(placement.holders):
            destination = int(destination_E[expert])
            assert destination in holders
            assert destination == rank or rank not in holders


@given(_placements())
def test_what_a_rank_expects_is_what_the_others_send(placement: Placement) -> None:
    world = range(placement.world_size)
    expects_RWE = torch.stack([_expected(ExpertHome(placement, rank, None), placement.num_experts) for rank in world])
    assert bool((expects_RWE.sum(0) == 1).all())
    for source in world:
        assert torch.equal(expects_RWE[:, source].argmax(0), ExpertHome(placement, source, None).destinations())


def test_rows_by_source_and_expert_are_found_by_expert_and_source() -> None:
    arriving_WL = torch.tensor([[2, 0, 1], [1, 3, 0]])
    rows = [(expert, source) for source in range(2) for expert in range(3) for _ in range(arriving_WL[source, expert])]
    assert [rows[row] for row in expert_major(arriving_WL).tolist()] == sorted(rows)
    assert expert_major(arriving_WL).tolist() == [0, 1, 3, 4, 5, 6, 2]
    assert expert_major(arriving_WL[:, :0]).tolist() == []


def test_senders_spread_over_the_replicas() -> None:
    placement = Placement(1, 6, ((0, 3),))
    destinations = [int(ExpertHome(placement, rank, None).destinations()[0]) for rank in range(6)]
    assert destinations == [0, 3, 0, 3, 0, 3]
