"""Routing against what it is defined to be."""

import pytest
import torch

from orchestrator.model.moe.routing.router import Router, balance_loss
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


def _router(num_experts: int = 5, top_k: int = 2, scaling_factor: float = 1.0) -> Router:
    router = Router(
        ModelSpec(
            hidden_size=8,
            num_attention_heads=2,
            n_routed_experts=num_experts,
            num_experts_per_tok=top_k,
            routed_scaling_factor=scaling_factor,
        )
    ).to(devices.device())
    with torch.no_grad():
        router.scorer.weight.copy_(_normal(num_experts, 8, seed=1))
    return router


def _tokens(count: int = 64) -> torch.Tensor:
    return _normal(count, 8, seed=2)


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(devices.device())


@pytest.mark.parametrize("scaling_factor", [1.0, 2.5])
def test_gates_are_the_chosen_scores_normalised(scaling_factor: float) -> None:
    router, x_ND = _router(scaling_factor=scaling_factor), _tokens()
    routing = router(x_ND)
    scores_NE = (x_ND @ router.scorer.weight.T).sigmoid()
    chosen_NK = scores_NE.gather(1, routing.expert_ids_NK)
    assert torch.equal(chosen_NK.sort(descending=True).values, scores_NE.sort(descending=True).values[:, :2])
    torch.testing.assert_close(routing.gates_NK, scaling_factor * chosen_NK / chosen_NK.sum(-1, keepdim=True))


def test_the_bias_changes_the_choice_of_experts_and_not_their_weights() -> None:
    router, x_ND = _router(), _tokens()
    before = router(x_ND)
    assert not bool((before.expert_ids_NK == 3).any(-1).all())
    router.correction_bias_E[3] = 10.0
    after = router(x_ND)
    assert bool((after.expert_ids_NK == 3).any(-1).all())
    scores_NK = (x_ND @ router.scorer.weight.T).sigmoid().gather(1, after.expert_ids_NK)
    torch.testing.assert_close(after.gates_NK, scores_NK / scores_NK.sum(-1, keepdim=True))


def test_the_bias_takes_no_gradient_and_the_weight_does() -> None:
    router = _router()
    gates_NK = router(_tokens()).gates_NK
    gates_NK[:, 0].sum().backward()
    assert router.scorer.weight.grad is not None and bool(router.scorer.weight.grad.abs().sum() > 0)
    assert not router.correction_bias_E.requires_grad


def test_scores_are_fp32_in_a_bf16_model() -> None:
    router = _router()
    router.scorer.weight.data = router.scorer.weight.data.bfloat16()
    assert router(_tokens().bfloat16()).gates_NK.dtype == torch.float32


def test_tokens_without_rows_are_routed_nowhere() -> None:
    routing = _router()(_tokens(0))
    assert routing.expert_ids_NK.shape == routing.gates_NK.shape == (0, 2)


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    spec = ModelSpec(
        hidden_size=8, num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=1
    )
    router = Router(spec).to(devices.device())
    with torch.no_grad():
        router.scorer.weight.copy_(torch.tensor([3.0, -9.0, 2.0, 2.5, -9.0, -9.0])[:, None].expand(6, 8))
    x_ND = torch.ones(4, 8, device=devices.device()) / 8
    # The best expert, 0, is alone in its group: 2 and 3 together are better.
    assert router(x_ND).expert_ids_NK.sort().values.tolist() == [[2, 3]] * 4


def test_softmax_scores_sum_to_one_before_they_are_chosen() -> None:
    spec = ModelSpec(
        hidden_size=8, num_attention_heads=2, n_routed_experts=5, num_experts_per_tok=5, scoring_func="softmax"
    )
    router, x_ND = Router(spec).to(devices.device()), _tokens()
    with torch.no_grad():
        router.scorer.weight.copy_(_normal(5, 8, seed=1))
    routing = router(x_ND)
    probabilities_NE = x_ND.new_zeros(64, 5).scatter(1, routing.expert_ids_NK, routing.gates_NK)
    torch.testing.assert_close(probabilities_NE, (x_ND @ router.scorer.weight.T).softmax(-1))
    assert router.spec.bias_update_speed == 0.0
    assert routing.balance_loss is not None


def test_the_balance_loss_by_hand() -> None:
    def loss(scores: list[list[float]], ids: list[int]) -> float:
        device = devices.device()
        scores_NE = torch.tensor(scores, device=device).view(-1, 2)
        return balance_loss(scores_NE, torch.tensor(ids, dtype=torch.int64, device=device)[:, None]).item()

    assert loss([[0.5, 0.5]] * 4, [0, 1, 0, 1]) == pytest.approx(4.0)
    assert loss([[1.0, 0.0]] * 4, [0] * 4) == pytest.approx(8.0)
    assert loss([], []) == 0.0
