"""The language model against formulas written in another way, and what its parts promise to those around it."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import expert_of
from orchestrator.model.attention.grouped_query import Attention, rotary_tables, rotate
from orchestrator.model.factory import catalogue
from orchestrator.model.linear.float8 import use_float8
from orchestrator.model.loss import IGNORED
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel, segments, within_documents
from orchestrator.spec.model import ModelSpec
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

VOCAB = 50


def _spec(
    first_k_dense_replace: int = 1, num_key_value_heads: int = 2, partial_rotary_factor: float = 1.0
) -> ModelSpec:
    return ModelSpec(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=24,
        first_k_dense_replace=first_k_dense_replace,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        partial_rotary_factor=partial_rotary_factor,
    )


def _model(spec: ModelSpec, placement: ExpertPlacement | None = None, rank: int = 0, seed: int = 0) -> MoELanguageModel:
    home = ExpertParallelContext(placement or ExpertPlacement.balanced(4, 1), rank, None)
    with devices.device():
        model = MoELanguageModel(spec, VOCAB, home)
    model.init_weights(seed)
    return model


def _tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5)).to(devices.device())


@pytest.mark.parametrize("rotary_size", [8, 4, 0])
def test_rotation_is_a_product_of_complex_numbers(rotary_size: int) -> None:
    x_BATS = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(6)).to(devices.device())
    half = rotary_size // 2
    angle_TH = torch.arange(5.0)[:, None] * 100.0 ** -(torch.arange(half) / max(half, 1))
    angle_TH = angle_TH.to(devices.device())
    turned = torch.complex(x_BATS[..., :half], x_BATS[..., half:rotary_size])
    turned = turned * torch.polar(torch.ones_like(angle_TH), angle_TH)
    wanted = torch.cat([turned.real, turned.imag, x_BATS[..., rotary_size:]], dim=-1)
    torch.testing.assert_close(rotate(x_BATS, *rotary_tables(5, rotary_size, 100.0, devices.device())), wanted)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_attention_equals_softmax_written_out(num_key_value_heads: int) -> None:
    spec = _spec(num_key_value_heads=num_key_value_heads)
    attention, size = Attention(spec), spec.head_dim
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for param in attention.parameters():
            param.normal_(0.0, 0.5, generator=generator)
    attention, x_TD = attention.to(devices.device()), torch.randn(6, 16, generator=generator).to(devices.device())
    rotary = rotary_tables(6, spec.rotary_size, spec.rope_theta, devices.device())
    heads = []
    for head in range(spec.num_attention_heads):
        group = head * num_key_value_heads // spec.num_attention_heads
        rows, kv_rows = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        q_TS = rotate(x_TD @ attention.query[rows].T, *rotary)
        k_TS = rotate(x_TD @ attention.key[kv_rows].T, *rotary)
        scores_TT = (q_TS @ k_TS.T / size**0.5).masked_fill(~torch.ones_like(x_TD[:, :6]).tril().bool(), float("-inf"))
        heads.append(scores_TT.softmax(-1) @ (x_TD @ attention.value[kv_rows].T))
    wanted_TD = torch.cat(heads, dim=-1) @ attention.output.T
    torch.testing.assert_close(attention(x_TD[None], rotary, None)[0], wanted_TD, rtol=1e-4, atol=1e-5)


def test_a_token_sees_nothing_that_comes_after_it() -> None:
    model, tokens_BT = _model(_spec()), _tokens()
    changed_BT = tokens_BT.clone()
    changed_BT[:, 7:] = (changed_BT[:, 7:] + 1) % VOCAB
    before, after = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("isolated", [True, False])
def test_another_document_changes_nothing_only_where_documents_are_isolated(isolated: bool) -> None:
    model, tokens_BT = _model(_spec()), _tokens()
    documents_BT = torch.tensor([0] * 5 + [1] * 7, device=devices.device()).expand(2, 12) if isolated else None
    changed_BT = tokens_BT.clone()
    changed_BT[:, :5] = (changed_BT[:, :5] + 1) % VOCAB
    before, after = (model(t, documents_BT=documents_BT)[:, 5:] for t in (tokens_BT, changed_BT))
    assert torch.allclose(before, after, atol=1e-6) == isolated
    losses_BT = model.token_losses(tokens_BT, tokens_BT, documents_BT=documents_BT)
    torch.testing.assert_close(losses_BT.sum(), model(tokens_BT, tokens_BT, documents_BT))


def test_one_document_in_a_row_is_the_same_with_and_without_isolation() -> None:
    model, tokens_BT = _model(_spec()), _tokens()
    torch.testing.assert_close(model(tokens_BT, documents_BT=torch.zeros_like(tokens_BT)), model(tokens_BT))


def test_the_mask_by_hand() -> None:
    mask = within_documents(torch.tensor([[0, 0, 1]], device=devices.device()))
    assert mask.shape == (1, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_the_loss_is_the_sum_over_targets_that_count() -> None:
    model, tokens_BT = _model(_spec()), _tokens()
    targets_BT = tokens_BT.roll(-1, 1)
    targets_BT[:, ::3] = IGNORED
    logits_BTV = model(tokens_BT)
    counted_BT = targets_BT != IGNORED
    wanted = F.cross_entropy(logits_BTV[counted_BT], targets_BT[counted_BT], reduction="sum")
    torch.testing.assert_close(model(tokens_BT, targets_BT), wanted)
    assert model(tokens_BT, torch.full_like(targets_BT, IGNORED)).item() == 0.0


@pytest.mark.parametrize("isolated", [True, False])
def test_a_micro_batch_without_rows_has_loss_0_and_all_gradients(isolated: bool) -> None:
    model, nothing = _model(_spec()), torch.zeros(0, 12, dtype=torch.int64, device=devices.device())
    loss = model(nothing, nothing, nothing if isolated else None)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())
    assert model.routing_counts().counts_LE.tolist() == [[0, 0, 0, 0]]


def test_counts_are_per_layer_of_experts() -> None:
    model = _model(_spec(first_k_dense_replace=0))
    model(_tokens())
    assert model.routing_counts().counts_LE.sum(-1).tolist() == [2 * 12 * 2] * 2


@pytest.mark.parametrize("first_k_dense_replace", [0, 1, 2])
def test_the_listing_has_every_parameter_of_the_model(first_k_dense_replace: int) -> None:
    spec = _spec(first_k_dense_replace)
    params, buffers = catalogue(spec, VOCAB)
    model = _model(spec)
    assert [(p.name, p.shape) for p in params] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert buffers == [(n, tuple(b.shape)) for n, b in model.named_buffers()]
    assert {p.expert for p in params} == ({None} if first_k_dense_replace == 2 else {None, 0, 1, 2, 3})


def test_a_rank_has_its_own_experts_in_the_order_of_the_listing() -> None:
    placement = ExpertPlacement(4, 2, ((1,), (0,), (0, 1), (1,)))
    params, _ = catalogue(_spec(), VOCAB)
    for rank in range(2):
        mine = {None, *placement.experts_of(rank)}
        names = [n for n, _ in _model(_spec(), placement, rank).named_parameters()]
        assert names == [p.name for p in params if p.expert in mine]


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    whole = dict(_model(_spec()).named_parameters())
    placement = ExpertPlacement.balanced(4, 3)
    for rank in range(3):
        for name, param in _model(_spec(), placement, rank).named_parameters():
            assert torch.equal(param, whole[name]), name
    other = dict(_model(_spec(), seed=1).named_parameters())
    assert all(torch.equal(other[name], whole[name]) == ("norm" in name) for name in whole)


def test_initial_weights_have_the_wanted_spread() -> None:
    spec = ModelSpec(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.02)
    model = MoELanguageModel(spec, 512, ExpertParallelContext(ExpertPlacement.balanced(8, 1), 0, None))
    model.init_weights(0)
    found = {name: float(param.detach().std()) for name, param in model.named_parameters() if "norm" not in name}
    for name, std in found.items():
        writes = name.endswith((".output", ".down"))
        assert std == pytest.approx(0.02 / 2 if writes else 0.02, rel=0.05), name
    assert all(bool((p == 1).all()) for n, p in model.named_parameters() if "norm" in n)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("layers.1.mlp.experts.12.gate_up", 12),
        ("layers.1.mlp.experts.0.down", 0),
        ("layers.1.mlp.shared.down", None),
        ("layers.0.mlp.down", None),
        ("embedding.weight", None),
    ],
)
def test_a_parameters_name_contains_its_expert(name: str, expert: int | None) -> None:
    assert expert_of(name) == expert


def _gradients(spec: ModelSpec) -> dict[str, torch.Tensor]:
    model = _model(spec)
    tokens_BU = _tokens(2, 13)
    model.with_balance_losses(model(tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous())).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
@pytest.mark.parametrize("recompute", ["selective", "sqrt", "full"])
def test_recomputed_activations_give_the_same_gradients(recompute: str, router: str) -> None:
    spec = _spec().model_copy(update={"num_hidden_layers": 5, "scoring_func": router, "router_aux_loss_coef": 0.1})
    kept = _gradients(spec)
    again = _gradients(spec.model_copy(update={"gradient_checkpointing": recompute}))
    assert kept.keys() == again.keys()
    for name, grad in kept.items():
        assert torch.equal(grad, again[name]), name


@pytest.mark.parametrize(
    ("recompute", "passes"), [("none", (1, 1)), ("selective", (1, 2)), ("sqrt", (2, 2)), ("full", (2, 2))]
)
def test_what_is_recomputed_is_what_its_name_says(recompute: str, passes: tuple[int, int]) -> None:
    model, counted = _model(_spec().model_copy(update={"gradient_checkpointing": recompute})), Counter[str]()
    for layer in model.layers:
        layer.attention_norm.register_forward_pre_hook(lambda *_: counted.update(["attention"]))
        layer.mlp.register_forward_pre_hook(lambda *_: counted.update(["mlp"]))
    tokens_BU = _tokens(2, 13)
    model(tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous()).backward()
    assert (counted["attention"], counted["mlp"]) == tuple(len(model.layers) * each for each in passes)


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 9, 10, 17])
def test_segments_cover_every_layer_once(num_layers: int) -> None:
    for recompute in ("sqrt", "full"):
        found = segments(num_layers, recompute)
        assert [layer for segment in found for layer in segment] == list(range(num_layers))
    assert max(len(segments(num_layers, "sqrt")), len(segments(num_layers, "sqrt")[0])) <= num_layers**0.5 + 1


def test_the_balance_loss_has_a_gradient_and_is_not_reported() -> None:
    spec = _spec().model_copy(update={"scoring_func": "softmax", "router_aux_loss_coef": 0.0})
    heavy = spec.model_copy(update={"router_aux_loss_coef": 1.0})
    tokens_BU = _tokens(2, 13)
    losses = [_model(s)(tokens_BU[:, :-1], tokens_BU[:, 1:].contiguous()).item() for s in (spec, heavy)]
    assert losses[0] == losses[1]
    name = "layers.1.mlp.router.scorer.weight"
    assert not torch.equal(_gradients(spec)[name], _gradients(heavy)[name])


DENSE_BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases and norms": {"attention_bias": True, "qk_norm": True},
    "recomputed": {"gradient_checkpointing": "selective"},
    "latent attention": {"kv_lora_rank": 8, "q_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
}


@pytest.mark.emulated
@pytest.mark.off_cpu
@pytest.mark.parametrize("form", ["fp32", "bf16", "float8", "documents"])
@pytest.mark.parametrize("kind", DENSE_BLOCKS)
def test_a_dense_block_leaves_the_host_alone_so_that_a_cuda_graph_could_hold_it(kind: str, form: str) -> None:
    """The host waits for no value and for no size that depends on values, forward and backward."""
    from tests.support.emulated_accelerator import host_syncs

    spec = ModelSpec.model_validate(_spec().model_dump(exclude_unset=True) | DENSE_BLOCKS[kind])
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    block = _model(spec).layers[0].to(dtype)
    if form == "float8":
        use_float8(block)
    x_BTD = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(8)).to(devices.device(), dtype)
    x_BTD.requires_grad_()
    rotary = rotary_tables(12, 4, 1e4, devices.device())
    documents_BT = torch.arange(12, device=devices.device()).div(5, rounding_mode="floor").expand(2, -1)
    with host_syncs() as places:
        mask = within_documents(documents_BT) if form == "documents" else None
        block(x_BTD, rotary, mask).square().sum().backward()
    assert not places
    assert x_BTD.grad is not None and all(param.grad is not None for param in block.parameters())
