"""The rules by which a router's bias follows the load, on tokens made by hand and drawn."""

import pytest
import torch
from torch import Tensor

from orchestrator.model.moe.routing.balance import (
    RoutingCounts,
    margin_histogram,
    margins,
    next_bias,
    quantile_bias,
    sign_bias,
)
from orchestrator.model.moe.routing.counting import count
from orchestrator.model.moe.routing.router import Limit, Router
from orchestrator.policy.health.expert_load import MARGIN_EDGES, NUM_MARGIN_BINS, expert_load
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


def _choices(num_tokens: int, num_experts: int, spread: float, seed: int = 0) -> Tensor:
    """Scores of which some experts' lie far above the others'."""
    generator = torch.Generator().manual_seed(seed)
    offsets_E = torch.randn(num_experts, generator=generator)
    return (
        (spread * (torch.randn(num_tokens, num_experts, generator=generator) + 2.0 * offsets_E))
        .sigmoid()
        .to(devices.device())
    )


def _counts(choice_NE: Tensor, top_k: int) -> Tensor:
    return count(choice_NE.topk(top_k, -1).indices.reshape(-1), choice_NE.shape[1])


def _histogram(choice_NE: Tensor, top_k: int) -> Tensor:
    best = choice_NE.topk(top_k + 1, -1).values
    return margin_histogram(margins(choice_NE, best[:, -2:-1], best[:, -1:]))


def _violation(counts_E: Tensor) -> float:
    return expert_load(counts_E[None].cpu().numpy()).max_violation


def test_margins_by_hand() -> None:
    choice_NE = torch.tensor([[0.9, 0.5, 0.3], [0.1, 0.7, 0.3]], device=devices.device())
    counted = _histogram(choice_NE, 1)
    wanted = torch.tensor([[0.4, -0.4, -0.6], [-0.6, 0.4, -0.4]])  # over the best of the other experts
    bins = torch.bucketize(wanted, torch.tensor(MARGIN_EDGES))
    for expert in range(3):
        assert counted[expert].nonzero().flatten().tolist() == sorted(set(bins[:, expert].tolist()))
    assert counted.sum(-1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_token_chooses_the_experts_where_its_margin_is_positive(top_k: int) -> None:
    choice_NE = _choices(500, 6, 0.5)
    positive_E = _histogram(choice_NE, top_k)[:, NUM_MARGIN_BINS // 2 :].sum(-1)
    assert positive_E.tolist() == _counts(choice_NE, top_k).tolist()


@pytest.mark.parametrize("spread", [0.02, 0.2, 1.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (16, 2), (64, 2), (64, 8)])
def test_the_quantile_rule_evens_loads_in_a_few_steps_however_far_scores_are_apart(
    num_experts: int, top_k: int, spread: float
) -> None:
    scores_NE, bias_E = _choices(4096, num_experts, spread), torch.zeros(num_experts, device=devices.device())
    before = _violation(_counts(scores_NE, top_k))
    for _ in range(16):
        margins_EM = _histogram(scores_NE + bias_E, top_k)
        bias_E = quantile_bias(bias_E[None], margins_EM[None], top_k, 0.5)[0]
    assert before > 1.0
    assert _violation(_counts(scores_NE + bias_E, top_k)) < 0.15


def test_the_sign_rule_lags_where_scores_are_far_apart() -> None:
    """The negative control: what the quantile rule does in 16 steps, the sign rule doesn't in 100."""
    scores_NE, bias_E = _choices(4096, 16, 2.0), torch.zeros(16, device=devices.device())
    for _ in range(100):
        bias_E = sign_bias(bias_E[None], _counts(scores_NE + bias_E, 2)[None], 1e-3)[0]
    assert _violation(_counts(scores_NE + bias_E, 2)) > 1.0


def test_an_even_load_moves_no_bias_much() -> None:
    scores_NE = torch.eye(4, device=devices.device()).repeat(64, 1) * 0.5
    moved_E = quantile_bias(scores_NE.new_zeros(1, 4), _histogram(scores_NE, 1)[None], 1, 1.0)[0]
    assert moved_E.abs().max() < 1e-6
    assert _counts(scores_NE + moved_E, 1).tolist() == [64] * 4


def test_a_bias_move_depends_on_sums_of_histograms_only() -> None:
    scores_NE = _choices(300, 8, 0.3)
    whole = _histogram(scores_NE, 2)
    parts = sum(_histogram(part, 2) for part in scores_NE.split([7, 100, 0, 193]))
    assert torch.equal(whole, parts)


def test_layers_without_tokens_keep_their_bias() -> None:
    bias_LE = torch.tensor([[0.1, -0.1], [0.2, -0.2]])
    margins_LEM = torch.zeros(2, 2, NUM_MARGIN_BINS, dtype=torch.int64)
    margins_LEM[1] = _histogram(_choices(50, 2, 1.0), 1).cpu()
    moved_LE = quantile_bias(bias_LE, margins_LEM, 1, 0.5)
    assert torch.equal(moved_LE[0], bias_LE[0]) and not torch.equal(moved_LE[1], bias_LE[1])
    assert bias_LE.tolist() == torch.tensor([[0.1, -0.1], [0.2, -0.2]]).tolist()


GROUPED = ModelSpec(
    hidden_size=8, num_attention_heads=2, n_routed_experts=16, num_experts_per_tok=2, n_group=8, topk_group=2
)
LIMITS = {
    "the model's groups": (GROUPED, []),
    "as many experts as are chosen": (GROUPED.model_copy(update={"n_group": 16}), []),
    "ranks": (GROUPED.model_copy(update={"n_group": 1}), [Limit([0] * 7 + [1] * 6 + [2] * 3, 1, best=2)]),
    "groups and ranks": (GROUPED, [Limit([0] * 8 + [1] * 4 + [2] * 4, 2, best=1)]),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_router_that_may_choose_among_some_experts_only_is_evened_as_well(case: str) -> None:
    spec, limits = LIMITS[case]
    x_ND = (torch.randn(4096, 8, generator=torch.Generator().manual_seed(3)) + 1.0).to(devices.device())
    router = Router(spec, limits)
    with torch.no_grad():
        router.scorer.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
    router = router.to(devices.device())
    violations = []
    for _ in range(25):
        routing = router(x_ND)
        counts_E = count(routing.expert_ids_NK.reshape(-1), 16)
        positive_E = routing.margins_EM[:, NUM_MARGIN_BINS // 2 :].sum(-1)
        assert (counts_E - positive_E).abs().max() <= 1  # where two scores are equal, neither margin is positive
        routed = RoutingCounts.of(counts_E[None], routing.margins_EM[None])
        router.correction_bias_E = next_bias(router.correction_bias_E[None], routed, spec, 1.0)[0]
        violations.append(_violation(counts_E))
    assert violations[0] > 1.0 and violations[-1] < 0.25


def test_a_layer_whose_router_counts_no_margins_follows_the_sign_rule() -> None:
    spec = ModelSpec(hidden_size=8, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2)
    routed = RoutingCounts.zeros(1, spec)
    routed.counts_LE[0, 3] = 100
    moved_LE = next_bias(torch.zeros(1, 8), routed, spec, 1.0)
    torch.testing.assert_close(moved_LE, sign_bias(torch.zeros(1, 8), routed.counts_LE, 1e-3))
    assert moved_LE.abs().max() == pytest.approx(1e-3)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 4), (1, 1)])
def test_where_every_token_visits_all_experts_nothing_is_counted_and_nothing_moves(
    num_experts: int, top_k: int
) -> None:
    spec = ModelSpec(hidden_size=8, num_attention_heads=2, n_routed_experts=num_experts, num_experts_per_tok=top_k)
    routing = _router(spec)(torch.randn(10, 8, device=devices.device()))
    assert routing.margins_EM is None and routing.gates_NK.isfinite().all()
    routed = RoutingCounts.zeros(1, spec)
    assert routed.margins_LEM.shape == (1, num_experts, 0)
    assert next_bias(torch.zeros(1, num_experts), routed, spec, 1.0).tolist() == [[0.0] * num_experts]


def test_a_router_counts_margins_in_training_only() -> None:
    router, x_ND = (
        _router(ModelSpec(hidden_size=8, num_attention_heads=2, n_routed_experts=4, num_experts_per_tok=2)),
        torch.randn(10, 8, device=devices.device()),
    )
    training, evaluating = router(x_ND), router.eval()(x_ND)
    assert training.margins_EM is not None and int(training.margins_EM.sum()) == 40
    assert evaluating.margins_EM is None
    assert torch.equal(training.expert_ids_NK, evaluating.expert_ids_NK)
    assert torch.equal(training.gates_NK, evaluating.gates_NK)


def test_fewer_tokens_than_experts_and_none_at_all() -> None:
    router = _router(ModelSpec(hidden_size=8, num_attention_heads=2, n_routed_experts=16, num_experts_per_tok=2))
    for num_tokens in (3, 0):
        margins_EM = router(torch.randn(num_tokens, 8, device=devices.device())).margins_EM
        moved_E = quantile_bias(torch.zeros(1, 16, device=devices.device()), margins_EM[None], 2, 0.5)[0]
        assert moved_E.isfinite().all() and moved_E.abs().max() <= 1.0
    assert moved_E.tolist() == [0.0] * 16


def test_the_share_falls_with_the_learning_rate_to_a_tenth() -> None:
    spec = ModelSpec(hidden_size=8, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2)
    margins_EM = _histogram(_choices(400, 8, 0.5), 2).cpu()
    routed = RoutingCounts.of(torch.zeros(1, 8, dtype=torch.int64), margins_EM[None])
    at_peak, at_half, at_end = (next_bias(torch.zeros(1, 8), routed, spec, decay) for decay in (1.0, 0.5, 0.0))
    torch.testing.assert_close(at_half, at_peak / 2)
    torch.testing.assert_close(at_end, at_peak / 10)


def test_the_sign_rule_moves_by_one_step_against_the_load() -> None:
    bias_LE, counts_LE = torch.zeros(2, 3), torch.tensor([[9, 0, 3], [4, 4, 4]])
    assert sign_bias(bias_LE, counts_LE, 0.5).tolist() == [[-0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    assert bias_LE.tolist() == [[0.0] * 3, [0.0] * 3]


def test_counts_beyond_fp32_are_compared_exactly() -> None:
    counts_LE = torch.tensor([[2**24 + 1, 2**24, 2**24]])
    assert sign_bias(torch.zeros(1, 3), counts_LE, 1.0).tolist() == [[-1.0, 1.0, 1.0]]


def test_counts_add_up() -> None:
    spec = ModelSpec(n_routed_experts=4, num_experts_per_tok=2)
    total, part = RoutingCounts.zeros(1, spec), RoutingCounts.zeros(1, spec)
    part.counts_LE[0, 1], part.margins_LEM[0, 2, 3] = 5, 7
    total.add(part)
    total.add(part)
    assert total.counts_LE.tolist() == [[0, 10, 0, 0]] and int(total.margins_LEM[0, 2, 3]) == 14


def _router(spec: ModelSpec) -> Router:
    router = Router(spec)
    with torch.no_grad():
        router.scorer.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    return router.to(devices.device())
