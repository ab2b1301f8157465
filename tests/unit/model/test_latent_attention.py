"""Multi-head latent attention against its formula, and in a model: no rows, documents, rows of unequal length."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.model.attention.grouped_query import rotary_tables, rotate
from orchestrator.model.attention.latent_attention import LatentAttention
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

VOCAB = 50


def _spec(**changes: Any) -> ModelSpec:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4}
    heads = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    return ModelSpec.model_validate(sizes | heads | {"moe_intermediate_size": 8, "intermediate_size": 24} | changes)


def _attention(spec: ModelSpec) -> LatentAttention:
    attention, generator = LatentAttention(spec), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in attention.parameters():
            param.normal_(1.0 if param.dim() == 1 else 0.0, 0.5, generator=generator)
    return attention.to(devices.device())


def _model(spec: ModelSpec) -> MoELanguageModel:
    with devices.device():
        model = MoELanguageModel(spec, VOCAB, ExpertParallelContext(ExpertPlacement.balanced(4, 1), 0, None))
    model.init_weights(0)
    return model


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1)).to(devices.device())


@pytest.mark.parametrize("value_dim", [8, 10, 14])  # smaller than the keys, equal, larger
@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_it_equals_its_formula(q_lora_rank: int | None, value_dim: int) -> None:
    spec = _spec(q_lora_rank=q_lora_rank, v_head_dim=value_dim)
    attention, generator = _attention(spec), torch.Generator().manual_seed(3)
    x_TD = torch.randn(6, 16, generator=generator).to(devices.device())
    rotary = rotary_tables(6, 4, spec.rope_theta, devices.device())
    latent = x_TD @ attention.latent.T
    keys_values = attention.latent_norm(latent[:, :12]) @ attention.key_value.T
    shared_TR = rotate(latent[:, 12:], *rotary)
    if q_lora_rank is None:
        queries = x_TD @ attention.query.T
    else:
        queries = attention.query_down_norm(x_TD @ attention.query_down.T) @ attention.query_up.T
    seen_TT = torch.ones(6, 6, dtype=torch.bool, device=devices.device()).tril()
    heads = []
    for q_TS, kv_TN in zip(queries.split(10, dim=1), keys_values.split(6 + value_dim, dim=1), strict=True):
        scores_TT = q_TS[:, :6] @ kv_TN[:, :6].T + rotate(q_TS[:, 6:], *rotary) @ shared_TR.T
        heads.append((scores_TT / 10**0.5).masked_fill(~seen_TT, float("-inf")).softmax(-1) @ kv_TN[:, 6:])
    wanted_TD = torch.cat(heads, dim=-1) @ attention.output.T
    torch.testing.assert_close(attention(x_TD[None], rotary, None)[0], wanted_TD, rtol=1e-4, atol=1e-5)


def test_neighbours_that_turn_together_are_another_order_of_the_same_weights() -> None:
    apart, beside = _attention(_spec()), _attention(_spec(rope_interleave=True))
    with torch.no_grad():
        for weights, first in ((beside.query.view(4, 10, 16), 6), (beside.latent[None], 12)):
            halves = weights[:, first:].clone()
            weights[:, first::2], weights[:, first + 1 :: 2] = halves[:, :2], halves[:, 2:]
    x_BTD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3)).to(devices.device())
    rotary = rotary_tables(5, 4, 1e4, devices.device())
    torch.testing.assert_close(beside(x_BTD, rotary, None), apart(x_BTD, rotary, None))


@pytest.mark.parametrize("isolated", [True, False])
def test_no_rows_cost_nothing_and_have_all_gradients(isolated: bool) -> None:
    model, nothing = _model(_spec(q_lora_rank=5)), _tokens(0, 12)
    loss = model(nothing, nothing, nothing if isolated else None)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


def test_documents_and_padding_keep_tokens_apart() -> None:
    model, tokens_BT = _model(_spec()), _tokens(2, 12)
    documents_BT = torch.tensor([0] * 5 + [1] * 7, device=devices.device()).expand(2, 12)
    changed_BT = tokens_BT.clone()
    changed_BT[:, :5] = (changed_BT[:, :5] + 1) % VOCAB
    before, after = (model(t, documents_BT=documents_BT)[:, 5:] for t in (tokens_BT, changed_BT))
    torch.testing.assert_close(before, after)
    lengths_B = torch.tensor([12, 4], device=devices.device())
    padded_BTV = model(tokens_BT, lengths_B=lengths_B)
    torch.testing.assert_close(padded_BTV[1, :4], model(tokens_BT[1:, :4])[0])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even, because rotary embedding turns pairs; got 3"),
        ({"qk_norm": True}, "qk_norm must be false with kv_lora_rank: latents have norms of their own; got true"),
        ({"attention_bias": True}, "attention_bias must be false with kv_lora_rank"),
    ],
)
def test_settings_that_latent_attention_lacks_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        _spec(**changes)
