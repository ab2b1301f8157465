"""Routing against what it is defined to be, and the balance rule on loads made by hand."""

import pytest
import torch

from orchestrator.model.router import Router, balance_loss, corrected_bias, max_violation
from orchestrator.spec.model import ModelSpec


def _router(num_experts: int = 5, top_k: int = 2, scaling_factor: float = 1.0) -> Router:
    router = Router(
        ModelSpec(
            hidden_size=8, num_heads=2, num_experts=num_experts, top_k=top_k, routed_scaling_factor=scaling_factor
        )
    )
    with torch.no_grad():
        router.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    return router


def _tokens(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_gates_are_the_chosen_scores_normalised(scaling_factor: float) -> None:
    router, x_ND = _router(scaling_factor=scaling_factor), _tokens()
    routing = router(x_ND)
    scores_NE = (x_ND @ router.weight.T).sigmoid()
    chosen_NK = scores_NE.gather(1, routing.expert_ids_NK)
    assert torch.equal(chosen_NK.sort(descending=True).values, scores_NE.sort(descending=True).values[:, :2])
    torch.testing.assert_close(routing.gates_NK, scaling_factor * chosen_NK / chosen_NK.sum(-1, keepdim=True))


def test_the_bias_decides_who_is_chosen_and_not_how_much_it_counts() -> None:
    router, x_ND = _router(), _tokens()
    before = router(x_ND)
    assert not bool((before.expert_ids_NK == 3).any(-1).all())
    router.correction_bias_E[3] = 10.0
    after = router(x_ND)
    assert bool((after.expert_ids_NK == 3).any(-1).all())
    scores_NK = (x_ND @ router.weight.T).sigmoid().gather(1, after.expert_ids_NK)
    torch.testing.assert_close(after.gates_NK, scores_NK / scores_NK.sum(-1, keepdim=True))


def test_the_bias_takes_no_gradient_and_the_weight_does() -> None:
    router = _router()
    gates_NK = router(_tokens()).gates_NK
    gates_NK[:, 0].sum().backward()
    assert router.weight.grad is not None and bool(router.weight.grad.abs().sum() > 0)
    assert not router.correction_bias_E.requires_grad


def test_scores_are_fp32_in_a_bf16_model() -> None:
    router = _router()
    router.weight.data = router.weight.data.bfloat16()
    assert router(_tokens().bfloat16()).gates_NK.dtype == torch.float32


def test_tokens_without_rows_are_routed_nowhere() -> None:
    routing = _router()(_tokens(0))
    assert routing.expert_ids_NK.shape == routing.gates_NK.shape == (0, 2)


def test_the_bias_moves_against_the_load_by_one_step() -> None:
    bias_LE = torch.zeros(2, 3)
    counts_LE = torch.tensor([[9, 0, 3], [4, 4, 4]])
    moved_LE = corrected_bias(bias_LE, counts_LE, 0.5)
    assert moved_LE.tolist() == [[-0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    assert bias_LE.tolist() == [[0.0] * 3, [0.0] * 3]


def test_an_even_load_is_a_fixed_point_and_a_skewed_one_is_driven_to_it() -> None:
    router, x_ND = _router(top_k=1), _tokens(512)
    with torch.no_grad():
        router.weight[0] += 1.5 * x_ND.mean(0) / x_ND.mean(0).norm()

    def counts_E() -> torch.Tensor:
        return torch.bincount(router(x_ND).expert_ids_NK.reshape(-1), minlength=5)

    violation = max_violation(counts_E()[None])
    for _ in range(300):
        router.correction_bias_E.copy_(corrected_bias(router.correction_bias_E[None], counts_E()[None], 2e-3)[0])
    assert max_violation(counts_E()[None]) < 0.2 < violation


def test_counts_beyond_fp32_are_compared_exactly() -> None:
    counts_LE = torch.tensor([[2**24 + 1, 2**24, 2**24]])
    assert corrected_bias(torch.zeros(1, 3), counts_LE, 1.0).tolist() == [[-1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("counts_LE", "wanted"),
    [
        pytest.param([[4, 4, 4]], 0.0, id="even"),
        pytest.param([[6, 3, 0]], 1.0, id="twice the mean"),
        pytest.param([[4, 4, 4], [12, 0, 0]], 2.0, id="the worst layer counts"),
    ],
)
def test_max_violation_by_hand(counts_LE: list[list[int]], wanted: float) -> None:
    assert max_violation(torch.tensor(counts_LE)) == wanted


def test_a_model_without_experts_violates_nothing() -> None:
    assert max_violation(torch.zeros(0, 8, dtype=torch.int64)) == 0.0


def test_few_tokens_violate_as_much_as_many() -> None:
    assert max_violation(torch.tensor([[1, 0, 0, 0]])) == 3.0
    assert max_violation(torch.tensor([[0, 0, 0, 0]])) == 0.0


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    spec = ModelSpec(hidden_size=8, num_heads=2, num_experts=6, top_k=2, num_expert_groups=3, top_k_groups=1)
    router = Router(spec)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([3.0, -9.0, 2.0, 2.5, -9.0, -9.0])[:, None].expand(6, 8))
    x_ND = torch.ones(4, 8) / 8
    # The best expert, 0, is alone in its group: 2 and 3 together are better.
    assert router(x_ND).expert_ids_NK.sort().values.tolist() == [[2, 3]] * 4


def test_softmax_scores_sum_to_one_before_they_are_chosen() -> None:
    spec = ModelSpec(hidden_size=8, num_heads=2, num_experts=5, top_k=5, router="softmax")
    router, x_ND = Router(spec), _tokens()
    with torch.no_grad():
        router.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
    routing = router(x_ND)
    probabilities_NE = torch.zeros(64, 5).scatter(1, routing.expert_ids_NK, routing.gates_NK)
    torch.testing.assert_close(probabilities_NE, (x_ND @ router.weight.T).softmax(-1))
    assert router.spec.bias_update_speed == 0.0
    assert routing.balance_loss is not None


def test_the_balance_loss_by_hand() -> None:
    even_NE = torch.full((4, 2), 0.5)
    assert balance_loss(even_NE, torch.tensor([[0], [1], [0], [1]])).item() == pytest.approx(4.0)
    skewed_NE = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert balance_loss(skewed_NE, torch.tensor([[0]] * 4)).item() == pytest.approx(8.0)
    assert balance_loss(even_NE[:0], torch.zeros(0, 1, dtype=torch.int64)).item() == 0.0
