"""The mixture-of-experts layer in a world of one against a loop over tokens, and in larger worlds against that."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.experts import GatedMLP
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.moe.routing.router import Router, Routing
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from tests.support import devices
from tests.unit.comm.threads import on_ranks

on_devices = pytest.mark.usefixtures("device")
# Others have ranks that are threads, whose backward passes would share the one thread of a GPU.

HIDDEN, INNER = 6, 10
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_p": {"selection": "top_p", "max_experts_per_tok": 4},
    "capacity": {"capacity_factor": 0.6},
    "top_p within a capacity": {"selection": "top_p", "capacity_factor": 0.7},
    "expert choice": {"selection": "expert_choice"},
}


def _layer(
    num_experts: int = 5, top_k: int = 2, n_shared_experts: int = 1, router: dict[str, Any] | None = None
) -> MoELayer:
    home = ExpertParallelContext(ExpertPlacement.balanced(num_experts, 1), 0, None)
    spec = ModelSpec(
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_key_value_heads=1,
        moe_intermediate_size=INNER,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        n_shared_experts=n_shared_experts,
        routed_scaling_factor=1.5,
        router=RouterSpec(**(router or {})),
    )
    layer = MoELayer(spec, home)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(0.0, 0.5, generator=generator)
    return layer.double().to(devices.device())


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(
        devices.device()
    )


def _mlp(mlp: GatedMLP, x_D: Tensor) -> Tensor:
    gate_H, up_H = (mlp.gate_up @ x_D).chunk(2)
    return mlp.down @ (F.silu(gate_H) * up_H)


def _token_by_token(layer: MoELayer, x_BTD: Tensor) -> Tensor:
    """What the layer is defined to compute, one token and one expert at a time."""
    rows, x_ND = [], x_BTD.reshape(-1, HIDDEN)
    routing = layer.router(x_ND)
    for x_D, ids_K, gates_K in zip(x_ND, routing.expert_ids_NK.tolist(), routing.gates_NK, strict=True):
        y_D = torch.zeros_like(x_D) if layer.shared is None else _mlp(layer.shared, x_D)
        for expert, gate in zip(ids_K, gates_K, strict=True):
            if expert == layer.num_experts:
                continue
            mlp = layer.experts[str(expert)]
            assert isinstance(mlp, GatedMLP)
            y_D = y_D + gate * _mlp(mlp, x_D)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


def _gradients(layer: MoELayer, y_BTD: Tensor, x_BTD: Tensor) -> dict[str, Tensor]:
    weights_BTD = torch.arange(y_BTD.numel(), dtype=torch.float64, device=y_BTD.device).view_as(y_BTD).cos()
    named = dict(layer.named_parameters())
    found = torch.autograd.grad((y_BTD * weights_BTD).sum(), [x_BTD, *named.values()])
    return dict(zip(["x", *named], found, strict=True))


@on_devices
@pytest.mark.parametrize(
    ("num_experts", "top_k", "n_shared_experts"),
    [
        pytest.param(5, 2, 1, id="one shared expert"),
        pytest.param(5, 3, 2, id="two shared experts"),
        pytest.param(4, 1, 0, id="no shared expert"),
        pytest.param(3, 3, 1, id="every expert chosen"),
    ],
)
def test_outputs_and_gradients_equal_those_of_a_loop_over_tokens(
    num_experts: int, top_k: int, n_shared_experts: int
) -> None:
    layer = _layer(num_experts, top_k, n_shared_experts)
    x_BTD = _tokens(2, 7).requires_grad_()
    y_BTD, wanted_BTD = layer(x_BTD), _token_by_token(layer, x_BTD)
    # Scores and gates are fp32 by design, in both: half an ulp of a gate times values of about 1. The rest is fp64.
    torch.testing.assert_close(y_BTD, wanted_BTD, rtol=1e-6, atol=1e-7)
    ours, theirs = _gradients(layer, y_BTD, x_BTD), _gradients(layer, wanted_BTD, x_BTD)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@on_devices
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "top_k"])
def test_experts_that_a_token_does_not_visit_add_nothing(router: str) -> None:
    layer = _layer(router=ROUTERS[router])
    x_BTD = _tokens(2, 20).requires_grad_()
    y_BTD, wanted_BTD = layer(x_BTD), _token_by_token(layer, x_BTD)
    visits_N = (layer.router(x_BTD.reshape(-1, HIDDEN)).expert_ids_NK < 5).sum(-1)
    assert len(set(visits_N.tolist())) > 1  # else the case shows nothing
    torch.testing.assert_close(y_BTD, wanted_BTD, rtol=1e-6, atol=1e-7)
    ours, theirs = _gradients(layer, y_BTD, x_BTD), _gradients(layer, wanted_BTD, x_BTD)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@on_devices
@pytest.mark.parametrize("router", ROUTERS)
def test_a_recomputed_pass_makes_the_same_choices(router: str) -> None:
    layer, x_BTD = _layer(router=ROUTERS[router]), _tokens(2, 20).requires_grad_()
    kept = _gradients(layer, layer(x_BTD), x_BTD)
    layer.counts_were_read = True  # as after each micro-batch
    y_BTD = checkpoint(layer, x_BTD, use_reentrant=False)
    for name, gradient in _gradients(layer, y_BTD, x_BTD).items():
        assert torch.equal(gradient, kept[name]), name


@on_devices
def test_choices_that_a_capacity_drops_are_counted_as_load_and_as_dropped() -> None:
    layer, x_BTD = _layer(router=ROUTERS["capacity"]), _tokens(2, 20)
    layer(x_BTD)
    counts = layer.last_counts_E.tolist()
    most = 10  # 40 tokens * 2 / 5 experts * 0.6, rounded up
    assert sum(counts) == 80 and max(counts) > most
    assert int(layer.last_dropped) == sum(max(count - most, 0) for count in counts)


@pytest.mark.filterwarnings("error")
def test_a_router_of_a_users_that_names_an_expert_that_is_not_there_is_an_error() -> None:
    layer = _layer()
    ids_NK = torch.tensor([[0, 5]] * 4)
    layer.router = nn.Identity()  # type: ignore[assignment]
    layer.router.forward = lambda x_ND: Routing(ids_NK, torch.ones(4, 2))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        layer(_tokens(1, 4)).sum().backward()


@on_devices
def test_every_copy_is_counted_for_its_expert() -> None:
    layer, x_BTD = _layer(), _tokens(3, 9)
    layer(x_BTD)
    chosen = layer.router(x_BTD.reshape(-1, HIDDEN)).expert_ids_NK.reshape(-1).tolist()
    assert layer.last_counts_E.tolist() == [Counter(chosen)[expert] for expert in range(5)]
    assert layer.last_counts_E.dtype == torch.int64


@on_devices
def test_an_expert_that_no_token_chose_has_gradients_of_zero() -> None:
    layer = _layer()
    layer.router.correction_bias_E[4] = -10.0
    layer(_tokens(1, 8)).sum().backward()
    for name, param in layer.named_parameters():
        assert param.grad is not None, name
        idle = name.startswith("experts.4.")
        assert bool((param.grad == 0).all()) == idle, name


@on_devices
def test_no_rows_give_no_rows_and_gradients_of_zero() -> None:
    layer = _layer()
    y_BTD = layer(_tokens(0, 8))
    assert y_BTD.shape == (0, 8, HIDDEN)
    assert layer.last_counts_E.tolist() == [0] * 5
    y_BTD.sum().backward()
    assert all(param.grad is not None and bool((param.grad == 0).all()) for param in layer.parameters())


@st.composite
def _placements(draw: st.DrawFn) -> ExpertPlacement:
    world_size = draw(st.integers(1, 5))
    ranks = st.sets(st.integers(0, world_size - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    holders = draw(st.lists(ranks, min_size=1, max_size=6))
    return ExpertPlacement(len(holders), world_size, tuple(holders))


SPREAD = ExpertPlacement(5, 3, ((1,), (0, 2), (0,), (0,), (1,)))  # rank 2 holds one expert, of which rank 0 has a copy
EMPTY = ExpertPlacement(5, 3, ((0,), (0,), (1,), (0,), (1,)))


@pytest.mark.parametrize("placement", [SPREAD, EMPTY, ExpertPlacement.balanced(5, 3), ExpertPlacement.balanced(2, 3)])
@pytest.mark.parametrize("n_shared_experts", [0, 1])
@pytest.mark.parametrize("nodes", [(), ("a", "b", "b")], ids=["one node", "two nodes"])
@pytest.mark.parametrize("is_exact", [False, True], ids=["fast", "exact"])
def test_layers_over_ranks_compute_what_one_layer_does(
    placement: ExpertPlacement, n_shared_experts: int, nodes: tuple[str, ...], is_exact: bool
) -> None:
    _compare_with_one_layer(_layer(placement.num_experts, 2, n_shared_experts), placement, nodes, is_exact)


@pytest.mark.parametrize("placement", [SPREAD, EMPTY])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "top_k"])
@pytest.mark.parametrize("is_exact", [False, True], ids=["fast", "exact"])
def test_layers_over_ranks_compute_what_one_layer_does_whatever_the_router(
    placement: ExpertPlacement, router: str, is_exact: bool
) -> None:
    _compare_with_one_layer(_layer(router=ROUTERS[router]), placement, (), is_exact)


def _compare_with_one_layer(
    whole: MoELayer, placement: ExpertPlacement, nodes: tuple[str, ...], is_exact: bool
) -> None:
    wanted = []
    for rank in range(3):
        x_BTD = _tokens(1, 4 + 3 * rank).requires_grad_()
        y_BTD = whole(x_BTD)
        wanted.append((y_BTD.detach(), _gradients(whole, y_BTD, x_BTD)))

    def run(rank: int, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        home = ExpertParallelContext(placement, rank, group, nodes=nodes, is_exact=is_exact)
        layer = MoELayer(whole.router.spec, home).double().to(devices.device())
        layer.load_state_dict(whole.state_dict(), strict=False)
        x_BTD = _tokens(1, 4 + 3 * rank).requires_grad_()
        y_BTD = layer(x_BTD)
        torch.testing.assert_close(y_BTD, wanted[rank][0], rtol=1e-6, atol=1e-9)
        return _gradients(layer, y_BTD, x_BTD)

    found = on_ranks(3, run)
    for name in wanted[0][1]:
        if name == "x":
            continue
        total = sum(gradients[name] for gradients in found if name in gradients)  # of every rank that has it
        theirs = sum(gradients[name] for _, gradients in wanted)
        torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    for ours, (_, theirs_) in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours["x"], theirs_["x"], rtol=1e-5, atol=1e-6)


@on_devices
def test_a_token_visits_the_ranks_that_are_best_for_it() -> None:
    layer = _layer(6, 2, 0)
    with torch.no_grad():
        layer.router.scorer.weight.copy_(torch.tensor([3.0, -9.0, 2.0, 2.5, -9.0, -9.0])[:, None].expand(6, HIDDEN))
    x_BTD = torch.ones(1, 4, HIDDEN, dtype=torch.float64, device=devices.device()) / HIDDEN

    def chosen(**limits: Any) -> list[int]:
        home = ExpertParallelContext(ExpertPlacement(6, 3, ((0,), (0,), (1,), (1,), (2,), (2,))), 0, None, **limits)
        router = Router(layer.router.spec, home.limits(2)).to(devices.device())
        router.load_state_dict(layer.router.state_dict())
        ids: list[list[int]] = router(x_BTD[0]).expert_ids_NK.sort().values.tolist()
        assert ids == [ids[0]] * 4
        return ids[0]

    assert chosen() == [0, 3]
    assert chosen(ranks_per_token=1) == [2, 3]  # the best one, 0, is alone on its rank
    assert chosen(ranks_per_token=2) == [0, 3]
    assert chosen(nodes_per_token=1, nodes=("a", "b", "a")) == [2, 3]
    assert chosen(nodes_per_token=1, nodes=("a", "a", "b")) == [0, 3]
    assert chosen(nodes_per_token=1, ranks_per_token=1, nodes=("a", "a", "b")) == [2, 3]
    assert chosen(nodes_per_token=1) == [0, 3]  # nobody knows the nodes


@on_devices
@given(_placements(), st.integers(1, 6), st.integers(1, 4), st.data())
def test_a_limit_leaves_enough_experts_to_choose_from(
    placement: ExpertPlacement, top_k: int, asked: int, data: st.DataObject
) -> None:
    top_k = min(top_k, placement.num_experts)
    rank = data.draw(st.integers(0, placement.world_size - 1))
    (limit,) = ExpertParallelContext(placement, rank, None, ranks_per_token=asked).limits(top_k)
    ranks = placement.destinations()[rank]
    assert limit.top <= max(asked, top_k)
    choice_NE = torch.randn(7, placement.num_experts, generator=torch.Generator().manual_seed(top_k))
    choice_NE, limit = choice_NE.to(devices.device()), limit.to(devices.device())
    assert [part.shape for part in limit(choice_NE[:0])] == [(0, placement.num_experts)] * 2
    limited_NE, margin_NE = limit(choice_NE)
    assert torch.equal(margin_NE > 0, limited_NE.isfinite())
    for open_E in limited_NE.isfinite():
        visited = {to for to, is_open in zip(ranks, open_E.tolist(), strict=True) if is_open}
        assert int(open_E.sum()) >= top_k and len(visited) == limit.top
        assert all(is_open == (to in visited) for to, is_open in zip(ranks, open_E.tolist(), strict=True))


@on_devices
def test_a_layer_that_is_used_twice_is_recomputed_with_the_choices_of_each_use() -> None:
    from torch.utils.checkpoint import checkpoint

    x_BTD = _tokens(1, 8)
    found = []
    for is_kept in (True, False):
        layer = _layer()
        block = layer if is_kept else lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)
        block(-3.0 * block(x_BTD)).square().sum().backward()
        found.append([param.grad for param in layer.parameters()])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed)
