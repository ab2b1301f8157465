"""Selections of experts against their definitions, token by token, and the threshold that holds their mean number."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.model.moe.routing.balance import RoutingCounts, next_bias, next_mass
from orchestrator.model.moe.routing.router import Router
from orchestrator.model.moe.routing.selection import (
    ExpertChoice,
    Selected,
    TopPSelection,
    selection_of,
    within_capacity,
)
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.router import RouterSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


def _spec(num_experts: int = 8, top_k: int = 2, scoring_func: str = "sigmoid", **router: Any) -> ModelSpec:
    return ModelSpec(
        hidden_size=8,
        num_attention_heads=2,
        n_routed_experts=num_experts,
        num_experts_per_tok=top_k,
        scoring_func=scoring_func,
        router=RouterSpec(**router),
    )


def _scores(num_tokens: int, num_experts: int, seed: int = 1, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits_NE = spread * torch.randn(num_tokens, num_experts, generator=generator)
    return logits_NE.sigmoid().to(devices.device())


def _select(spec: ModelSpec, scores_NE: Tensor, bias_E: Tensor | None = None, offset: float = 0.0) -> Selected:
    selection = selection_of(spec).to(devices.device())
    if isinstance(selection, TopPSelection):
        selection.mass_offset_1.fill_(offset)
    bias_E = torch.zeros(spec.n_routed_experts, device=scores_NE.device) if bias_E is None else bias_E
    selected: Selected = selection(scores_NE, bias_E, True)
    return selected


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.3, -9.0, 9.0])
def test_top_p_takes_the_best_until_their_shares_reach_the_threshold(offset: float) -> None:
    spec = _spec(selection="top_p", max_experts_per_tok=5)
    scores_NE, bias_E = _scores(200, 8), 0.2 * _scores(1, 8, seed=2)[0]
    selected = _select(spec, scores_NE, bias_E, offset)
    numbers = set()
    for scores_E, ids_K in zip(scores_NE, selected.expert_ids_NK.tolist(), strict=True):
        wanted, reached = [], 0.0
        for expert in (scores_E + bias_E).argsort(descending=True).tolist()[:5]:
            if wanted and reached >= 1.5 / 8 + offset:
                break
            wanted.append(expert)
            reached += float(scores_E[expert] / scores_E.sum())
        assert ids_K == wanted + [8] * (5 - len(wanted))
        numbers.add(len(wanted))
    assert numbers == {-9.0: {1}, 9.0: {5}}.get(offset, numbers) and (abs(offset) > 1 or len(numbers) > 1)


@pytest.mark.parametrize("num_experts", [8, 5])
def test_margins_are_positive_for_the_experts_that_a_token_chooses(num_experts: int) -> None:
    spec = _spec(num_experts, selection="top_p", max_experts_per_tok=5)
    selected = _select(spec, _scores(300, num_experts))
    assert selected.margins_EM is not None
    bins = selected.margins_EM.shape[1]
    chosen = torch.bincount(selected.expert_ids_NK.reshape(-1).cpu(), minlength=num_experts + 1)[:num_experts]
    assert torch.equal(selected.margins_EM[:, bins // 2 :].sum(-1).cpu(), chosen)
    assert selected.margins_EM.sum(-1).tolist() == [300] * num_experts


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (16, 2)])
def test_the_threshold_finds_the_wanted_mean_and_the_bias_the_balance(
    scoring_func: str, spread: float, num_experts: int, top_k: int
) -> None:
    spec = _spec(num_experts, top_k, scoring_func, selection="top_p")
    router = Router(spec).to(devices.device())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.scorer.weight.copy_(torch.randn(num_experts, 8, generator=generator) * spread / 8**0.5)
    selection = router.selection
    assert isinstance(selection, TopPSelection)
    for step in range(60):
        x_ND = torch.randn(2048, 8, generator=torch.Generator().manual_seed(step)).to(devices.device())
        routing = router(x_ND)
        counts_E = torch.bincount(routing.expert_ids_NK.reshape(-1).cpu(), minlength=num_experts + 1)[:num_experts]
        routed = RoutingCounts.zeros(1, spec)
        routed.counts_LE.copy_(counts_E)
        routed.masses_LM.copy_(routing.masses_M.cpu())
        if routing.margins_EM is not None:
            routed.margins_LEM.copy_(routing.margins_EM.cpu())
            router.correction_bias_E.copy_(next_bias(router.correction_bias_E[None].cpu(), routed, spec, 1.0)[0])
        selection.mass_offset_1.copy_(next_mass(selection.mass_offset_1[None].cpu(), routed, spec, 1.0)[0])
    assert float(counts_E.sum()) / 2048 == pytest.approx(top_k, rel=0.05)
    if scoring_func == "sigmoid":
        assert float(counts_E.max() / counts_E.float().mean()) < 1.5
    numbers = (routing.expert_ids_NK < num_experts).sum(-1)
    assert spread < 1 or len(set(numbers.tolist())) > 2


def test_counts_of_a_batch_in_parts_give_the_same_threshold() -> None:
    spec, scores_NE = _spec(selection="top_p"), _scores(400, 8)
    whole, parts = RoutingCounts.zeros(1, spec), RoutingCounts.zeros(1, spec)
    for counts, pieces in ((whole, [scores_NE]), (parts, scores_NE.split(70))):
        for piece in pieces:
            counts.masses_LM.add_(_select(spec, piece).masses_M.cpu())  # type: ignore[union-attr]
    assert torch.equal(whole.masses_LM, parts.masses_LM)
    moved, at_end = (next_mass(torch.zeros(1, 1), whole, spec, decay) for decay in (1.0, 0.0))
    assert moved.shape == (1, 1) and float(moved) != 0.0
    torch.testing.assert_close(at_end, moved / 10)
    assert next_mass(torch.ones(1, 1), RoutingCounts.zeros(1, spec), spec, 1.0).tolist() == [[1.0]]


def test_expert_choice_gives_each_expert_its_best_tokens() -> None:
    spec, scores_NE = _spec(num_experts=5, selection="expert_choice"), _scores(31, 5)
    ids_NK = _select(spec, scores_NE).expert_ids_NK
    for expert in range(5):
        taken = (ids_NK == expert).any(-1).nonzero().squeeze(1).tolist()
        assert taken == sorted(scores_NE[:, expert].argsort(descending=True)[:13].tolist())  # 31 * 2 / 5, rounded up
    assert isinstance(selection_of(spec), ExpertChoice) and spec.bias_update_speed == 0.0
    assert all(ids == sorted(ids) for ids in ids_NK.tolist())


@pytest.mark.parametrize("selection", ["top_k", "top_p", "expert_choice"])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token_are_routed(selection: str, num_tokens: int) -> None:
    spec = _spec(selection=selection, **({} if selection == "expert_choice" else {"capacity_factor": 1.0}))
    router = Router(spec).to(devices.device())
    for param in router.parameters():  # whose memory may hold anything
        torch.nn.init.normal_(param)
    routing = router(torch.randn(num_tokens, 8, device=devices.device()))
    assert len(routing.expert_ids_NK) == len(routing.gates_NK) == num_tokens
    assert bool(routing.gates_NK.isfinite().all())


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2, unique=True), max_size=20),
    st.integers(1, 6),
    st.data(),
)
def test_a_capacity_keeps_the_best_choices_of_each_expert(ids: list[list[int]], most: int, data: st.DataObject) -> None:
    levels = st.sampled_from([0.25, 0.5, 0.75])  # so that some are equal
    scores = [[data.draw(levels) for _ in row] for row in ids]
    ids_NK, scores_NK = torch.tensor(ids, dtype=torch.int64).view(-1, 2), torch.tensor(scores).view(-1, 2)
    kept = within_capacity(ids_NK, scores_NK, 4, most)
    wanted = ids_NK.clone()
    for expert in range(4):
        places = [(-scores[n][k], n, k) for n, row in enumerate(ids) for k, e in enumerate(row) if e == expert]
        for _, n, k in sorted(places)[most:]:
            wanted[n, k] = 4
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize(("top_k", "selection"), [(1, "top_k"), (2, "top_p")])
def test_choices_are_dropped_by_their_scores_before_these_are_normalised(top_k: int, selection: str) -> None:
    router = Router(_spec(top_k=top_k, selection=selection, capacity_factor=0.5)).to(devices.device())
    with torch.no_grad():
        router.scorer.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).to(devices.device())
    routing, scores_NE = router(x_ND), (x_ND @ router.scorer.weight.T).sigmoid()
    assert routing.chosen_NK is not None
    for expert in range(8):
        kept_N, chose_N = ((ids_NK == expert).any(-1) for ids_NK in (routing.expert_ids_NK, routing.chosen_NK))
        dropped_N = chose_N & ~kept_N
        if bool(dropped_N.any()):
            assert scores_NE[kept_N, expert].min() >= scores_NE[dropped_N, expert].max()


def test_gates_of_dropped_choices_are_zero_and_those_of_others_stay() -> None:
    plain, limited = (Router(_spec(**router)).to(devices.device()) for router in ({}, {"capacity_factor": 0.5}))
    with torch.no_grad():
        plain.scorer.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    limited.load_state_dict(plain.state_dict())
    x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(2)).to(devices.device())
    before, after = plain(x_ND), limited(x_ND)
    is_kept_NK = after.expert_ids_NK < 8
    assert torch.equal(after.chosen_NK, before.expert_ids_NK) and not bool(is_kept_NK.all())
    assert torch.equal(after.gates_NK, before.gates_NK * is_kept_NK)
    assert torch.bincount(after.expert_ids_NK.reshape(-1).cpu(), minlength=9)[:8].max() <= 8  # 64 * 2 / 8 * 0.5
