"""Tokens that leave a model early: what they run, and that one by one they get what a whole row gets."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.model.attention.kv_cache import KVCache
from orchestrator.model.early_exit import EarlyExit, ExitRule
from orchestrator.model.factory import build_model, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.exits import ExitsSpec
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

V, LAYERS, EXITS = 61, 5, (1, 3)
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases and norms": {"qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5},
    "norms of all heads": {"qk_norm": "all_heads"},
    "latent": {"kv_lora_rank": 12, "q_lora_rank": 10, "rope_interleave": True, "v_head_dim": 10},
    "context": {"router": {"scorer": "context"}},
}


def _model(**changes: Any) -> MoELanguageModel:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "initializer_range": 0.2,
        "exits": ExitsSpec(layers=EXITS),
    }
    spec = ModelSpec.model_validate(sizes | changes)
    with devices.device():
        model = build_model(spec, V, single_rank(spec))
    assert isinstance(model, MoELanguageModel)
    model.init_weights(0)
    return model.eval()


def _rule(model: MoELanguageModel, threshold: float) -> ExitRule:
    """Estimates are numbers of any sign that differ from token to token."""
    weights_XD = torch.randn(len(EXITS), model.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    return ExitRule(weights_XD, torch.zeros(len(EXITS)), threshold)  # as it is read, wherever the model is


def _tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1)).to(devices.device())


def test_the_threshold_decides_how_many_leave() -> None:
    model, inputs_BT = _model(), _tokens()
    with torch.no_grad():
        wanted = model.scores(inputs_BT)
    scores, layers_N = EarlyExit(model, _rule(model, -torch.inf)).scores(inputs_BT, inputs_BT)
    assert layers_N.tolist() == [LAYERS] * inputs_BT.numel() and torch.equal(scores.x_ND, wanted.x_ND)
    scores, layers_N = EarlyExit(model, _rule(model, torch.inf)).scores(inputs_BT, inputs_BT)
    may_leave_N = (torch.arange(inputs_BT.numel()) % inputs_BT.shape[1] > 0).to(devices.device())
    assert torch.equal(layers_N, torch.where(may_leave_N, EXITS[0], LAYERS))  # the first one of a row is its prompt
    assert torch.equal(scores.x_ND[may_leave_N], wanted.exits[0][may_leave_N])
    _, layers_N = EarlyExit(model, _rule(model, 0.0)).scores(inputs_BT, inputs_BT)
    assert set(layers_N.tolist()) == {*EXITS, LAYERS}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_tokens_one_by_one_get_what_a_row_gets(changes: dict[str, Any]) -> None:
    """Also those that attend to tokens that have left, of which later layers have but keys and values."""
    model, inputs_1T = _model(**changes), _tokens(rows=1)
    early = EarlyExit(model, _rule(model, 0.0))
    scores, layers_N = early.scores(inputs_1T, inputs_1T)
    assert len(set(layers_N.tolist())) > 1
    cache = KVCache(model.spec, 1, 12, model.head)
    early.begin(inputs_1T[:, :1], cache)
    for at in range(1, 12):
        logits_1V, layers_1 = early.extend(inputs_1T[:, at : at + 1], cache)
        assert layers_1.tolist() == [int(layers_N[at])]
        torch.testing.assert_close(logits_1V, scores.logits(slice(at, at + 1)), rtol=1e-4, atol=1e-4)
    # What waits is computed once a layer runs, also for several tokens that come together.
    assert cache.length == 12 and any(layer.waiting for layer in cache.layers)
    assert all(layer.length + len(layer.waiting) == 12 for layer in cache.layers)


def test_several_tokens_run_all_layers_after_some_that_have_left() -> None:
    model, inputs_1T = _model(), _tokens(rows=1)
    early = EarlyExit(model, _rule(model, torch.inf))
    cache, other = (KVCache(model.spec, 1, 12, model.head) for _ in range(2))
    for at in range(5):
        early.extend(inputs_1T[:, at : at + 1], cache)
    with pytest.raises(ValueError, match="5 tokens wait in the cache"):
        model.extend(inputs_1T[:, 5:6], cache)
    cache = KVCache(model.spec, 1, 12, model.head)
    for at in range(5):
        early.extend(inputs_1T[:, at : at + 1], cache)
    found_1V = early.begin(inputs_1T[:, 5:], cache)
    assert {layer.length for layer in cache.layers} == {12}
    with torch.no_grad():  # by hand: keys and values of each layer from the first exit's states
        x_1TD = model.layers[0](*_start(model, inputs_1T[:, :5], 0), other.layers[0])
        for layer, layer_cache in list(zip(model.blocks, other.layers, strict=True))[1:]:
            layer.fill(x_1TD, model.rotary(5, 0, x_1TD.device), layer_cache)
    wanted_1V = model.extend(inputs_1T[:, 5:], other)
    torch.testing.assert_close(found_1V, wanted_1V, rtol=1e-4, atol=1e-4)


def _start(model: MoELanguageModel, inputs_BT: Tensor, before: int) -> tuple[Any, ...]:
    start = model.start(inputs_BT, before=before)
    return start.x_BTD, start.rotary, start.mask_B1TC


def test_rows_of_a_batch_leave_apart() -> None:
    model, inputs_BT = _model(), _tokens(rows=4)
    early = EarlyExit(model, _rule(model, 0.0))
    scores, layers_N = early.scores(inputs_BT, inputs_BT)
    cache = KVCache(model.spec, 4, 12, model.head)
    wanted_BT, wanted_BTV = layers_N.view(4, 12), scores.logits(slice(None)).view(4, 12, V)
    assert any(len(set(wanted_BT[:, at].tolist())) > 1 for at in range(12))
    early.begin(inputs_BT[:, :1], cache)
    for at in range(1, 12):
        logits_BV, layers_B = early.extend(inputs_BT[:, at : at + 1], cache)
        assert torch.equal(layers_B, wanted_BT[:, at])
        torch.testing.assert_close(logits_BV, wanted_BTV[:, at], rtol=1e-4, atol=1e-4)


def test_layers_that_all_have_left_are_not_run() -> None:
    model, inputs_11 = _model(), _tokens(rows=1, length=1)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    cache = KVCache(model.spec, 1, 3, model.head)
    EarlyExit(model, _rule(model, torch.inf)).extend(inputs_11, cache)
    assert ran == [0]
    EarlyExit(model, _rule(model, -torch.inf)).extend(inputs_11, cache)
    assert ran == [0, 0, 1, 2, 3, 4]


def test_padding_is_left_out() -> None:
    model, inputs_BT = _model(), _tokens(rows=2)
    early = EarlyExit(model, _rule(model, 0.0))
    padded, layers_N = early.scores(inputs_BT, inputs_BT, lengths_B=torch.tensor([12, 5], device=devices.device()))
    alone, alone_N = early.scores(inputs_BT[1:, :5], inputs_BT[1:, :5])
    assert torch.equal(layers_N[12:], alone_N)
    torch.testing.assert_close(padded.x_ND[12:], alone.x_ND, rtol=1e-4, atol=1e-4)


def test_a_prompt_runs_all_layers_however_short() -> None:
    """Also in what a whole row would get, where tokens without a target are a prompt's."""
    model, inputs_1T = _model(), _tokens(rows=1)
    early = EarlyExit(model, _rule(model, torch.inf))
    targets_1T = inputs_1T.clone()
    targets_1T[:, :3] = IGNORED  # its last token has one: the first token of the answer
    scores, layers_N = early.scores(inputs_1T, targets_1T)
    assert layers_N.tolist() == [LAYERS] * 4 + [EXITS[0]] * 8
    for borders in ((0, 4), (0, 1, 4)):
        cache = KVCache(model.spec, 1, 12, model.head)
        for first, last in pairwise(borders):
            early.begin(inputs_1T[:, first:last], cache)
        logits_1V, layers_1 = early.extend(inputs_1T[:, 4:5], cache)
        assert layers_1.tolist() == [EXITS[0]]
        torch.testing.assert_close(logits_1V, scores.logits(slice(4, 5)), rtol=1e-4, atol=1e-4)
