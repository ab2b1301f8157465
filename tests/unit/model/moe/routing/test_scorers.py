"""Scorers of routers: their formulas, that new ones score alike, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.checkpoint.hf.family import folded
from orchestrator.model.draws import draw_normal
from orchestrator.model.moe.routing.router import Router
from orchestrator.model.moe.routing.scorers import (
    SCORERS,
    AttentionScorer,
    ContextScorer,
    Scorer,
    initial_std,
    scorer_of,
)
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


def _spec(scorer: str, hidden_size: int = 12, num_experts: int = 5) -> ModelSpec:
    shape = {} if scorer == "linear" else {"rank": 4}
    router = RouterSpec(scorer=scorer, **shape)
    return ModelSpec(hidden_size=hidden_size, num_attention_heads=2, n_routed_experts=num_experts, router=router)


def _scorer(spec: ModelSpec) -> Scorer:
    scorer = scorer_of(spec)
    with torch.no_grad():
        for name, param in scorer.named_parameters():
            draw_normal(param, name, 3, initial_std(f"router.scorer.{name}", spec))
    return scorer.to(devices.device())


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(devices.device())


def test_attention_scores_a_query_against_keys_and_folds_into_a_linear_scorer() -> None:
    spec = _spec("attention")
    scorer, x_ND = _scorer(spec), _normal(50, 12, seed=1)
    assert isinstance(scorer, AttentionScorer)
    query_NR, keys_ER = x_ND @ scorer.query.T, scorer.keys / spec.initializer_range
    logits_NE = scorer(x_ND)
    torch.testing.assert_close(logits_NE, query_NR @ keys_ER.T / 4)
    weight_ED = torch.from_numpy(folded(scorer.query.detach().cpu().numpy(), scorer.keys.detach().cpu().numpy(), spec))
    torch.testing.assert_close(F.linear(x_ND, weight_ED.to(devices.device())), logits_NE, rtol=1e-6, atol=1e-6)


def test_context_scores_each_head_and_takes_the_log_of_the_mean_of_their_exponentials() -> None:
    spec = _spec("context")
    scorer, x_ND, context_ND = _scorer(spec), _normal(50, 12, seed=1), _normal(50, 12, seed=2)
    assert isinstance(scorer, ContextScorer)
    normed_ND = context_ND / (context_ND.square().mean(-1, keepdim=True) + spec.rms_norm_eps).sqrt()
    heads = []
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        query_NR = x_ND @ scorer.query[rows].T + normed_ND @ scorer.context_query[rows].T
        keys_ER = scorer.keys[5 * head : 5 * head + 5] / spec.initializer_range
        heads.append(query_NR @ keys_ER.T / 4)
    wanted_NE = torch.stack(heads).exp().mean(0).log()
    torch.testing.assert_close(scorer(x_ND, context_ND), wanted_NE)
    assert not torch.allclose(scorer(x_ND, 0 * context_ND), wanted_NE, atol=1e-3)
    # No linear scorer is equal: logits of a sum differ from the sum of logits.
    twice_NE = scorer(2 * x_ND, 0 * context_ND)
    assert not torch.allclose(twice_NE, 2 * scorer(x_ND, 0 * context_ND), rtol=1e-3)


@pytest.mark.parametrize("scorer", SCORERS)
def test_new_scorers_of_all_kinds_vary_alike(scorer: str) -> None:
    made = _scorer(_spec(scorer, hidden_size=256, num_experts=64))
    logits_NE = made(_normal(500, 256, seed=1), _normal(500, 256, seed=2))
    assert 0.5 < float(logits_NE.detach().std()) / (0.02 * 16) < 1.5


def test_an_update_moves_logits_as_fast_as_those_of_a_linear_scorer() -> None:
    """One of Adam's, of the learning rate in each weight, in the direction in which a token's logit grows."""
    moved = {}
    for scorer in ("linear", "attention"):
        made, x_ND = _scorer(_spec(scorer, hidden_size=256, num_experts=64)), _normal(200, 256, seed=1)
        changes = []
        for token in range(len(x_ND)):
            logit = made(x_ND[token : token + 1])[0, 0]
            gradients = torch.autograd.grad(logit, list(made.parameters()))
            changes.append(float(sum(gradient.abs().sum() for gradient in gradients)))
        moved[scorer] = sum(changes) / len(changes)
    assert 0.5 < moved["attention"] / moved["linear"] < 1.5


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_fp32_in_a_bf16_model_and_all_weights_have_gradients(scorer: str) -> None:
    made = _scorer(_spec(scorer)).bfloat16()
    logits_NE = made(_normal(9, 12, seed=1).bfloat16(), _normal(9, 12, seed=2).bfloat16())
    assert logits_NE.dtype == torch.float32
    logits_NE.square().sum().backward()
    assert all(param.grad is not None and bool(param.grad.any()) for param in made.parameters())


def test_a_scorer_that_reads_the_context_names_what_it_lacks() -> None:
    router = Router(_spec("context")).to(devices.device())
    with pytest.raises(ValueError, match=r"called without context; call MoELayer\(x, context\)"):
        router(_normal(3, 12, seed=1))
