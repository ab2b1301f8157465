"""A user's own model: what it is given, where its first weights come from, what is refused and in which words."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.errors import EntrypointError
from orchestrator.model.factory import build_model, catalogue, single_rank
from orchestrator.model.loss import IGNORED
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.user_model import UserModel, raised_by_forward
from orchestrator.spec.model import ModelSpec
from tests.support.own_models import example, linear, own_spec

VOCAB = 50
LAYER, THROUGH = "self.moe = MoELayer(spec, experts)", "return self.head(self.moe(self.embedding(tokens)))"
EXPERTS = linear(layers=LAYER, forward=THROUGH)
DENSE = ModelSpec(**example("dense", hidden_size=32, num_hidden_layers=2, intermediate_size=48))
MOE = ModelSpec(**example("moe", hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16))
TOKENS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


def _model(spec: ModelSpec, placement: ExpertPlacement | None = None, rank: int = 0, seed: int = 0) -> UserModel:
    home = single_rank(spec) if placement is None else ExpertParallelContext(placement, rank, None)
    model = build_model(spec, VOCAB, home)
    assert isinstance(model, UserModel)
    model.init_weights(seed)
    return model


def _state(model: UserModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.state_buffers())}


@pytest.mark.parametrize("spec", [DENSE, MOE], ids=["dense", "moe"])
def test_the_loss_is_the_sum_over_targets_that_count(spec: ModelSpec) -> None:
    model, targets_BT = _model(spec), TOKENS.roll(-1, 1)
    targets_BT[:, ::3] = IGNORED
    logits_BTV = model(TOKENS)
    assert logits_BTV.shape == (2, 12, VOCAB)
    counted_BT = targets_BT != IGNORED
    wanted = F.cross_entropy(logits_BTV[counted_BT], targets_BT[counted_BT], reduction="sum")
    torch.testing.assert_close(model(TOKENS, targets_BT), wanted)


def test_the_routers_auxiliary_loss_is_in_the_gradients_alone(tmp_path: Path) -> None:
    grads, losses = [], []
    for weight in (0.0, 10.0):
        model = _model(own_spec(tmp_path, EXPERTS, scoring_func="softmax", router_aux_loss_coef=weight))
        loss = model.with_balance_losses(model(TOKENS, TOKENS))
        loss.backward()
        losses.append(loss.item())
        grads.append(model.moe_layers[0].router.scorer.weight.grad)
    assert losses[0] == losses[1]
    assert grads[0] is not None and grads[1] is not None and not torch.allclose(grads[0], grads[1])


def test_experts_are_counted_per_layer() -> None:
    model = _model(MOE)
    model(TOKENS)
    assert model.routing_counts().counts_LE.shape == (1, MOE.n_routed_experts)
    assert model.routing_counts().counts_LE.sum().item() == TOKENS.numel() * MOE.num_experts_per_tok
    assert _model(DENSE).routing_counts().counts_LE.shape == (0, DENSE.n_routed_experts)


@pytest.mark.parametrize("spec", [DENSE, MOE], ids=["dense", "moe"])
def test_the_listing_has_every_parameter_of_the_model(spec: ModelSpec) -> None:
    params, buffers = catalogue(spec, VOCAB)
    model = _model(spec)
    assert [(p.name, p.shape) for p in params] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert buffers == [(n, tuple(b.shape)) for n, b in model.state_buffers()]
    assert {p.expert for p in params} == {None, *(range(spec.n_routed_experts) if spec is MOE else ())}


def test_tied_weights_are_one_parameter() -> None:
    params, _ = catalogue(DENSE, VOCAB)
    names = {param.name for param in params}
    assert "model.tokens.weight" in names and "model.head.weight" not in names
    model = _model(DENSE)
    assert model.model.head.weight is model.model.tokens.weight  # type: ignore[union-attr]
    assert len(params) == len({id(p) for p in model.parameters()})


# Four ways to make first weights; each but the first would depend on the experts that a rank holds, were they there.
INITS = {
    "by its layers": "",
    "all parameters in turn": "[nn.init.normal_(p) for p in self.parameters()]",
    "apply": "self.apply(lambda m: [nn.init.normal_(p) for p in m.parameters(recurse=False)])",
}
LATER = "    def init_weights(self, seed):\n        [nn.init.constant_(p, 0.5 + seed) for p in self.parameters()]\n"


@pytest.mark.parametrize("init", INITS.values(), ids=INITS.keys())
def test_first_weights_are_equal_whatever_world_makes_them(tmp_path: Path, init: str) -> None:
    layers = LAYER + "; self.register_buffer('noise', torch.randn(3))"
    spec = own_spec(tmp_path, linear(layers=layers, init=init, forward=THROUGH))
    whole = _state(_model(spec, seed=7))
    assert all(bool(tensor.isfinite().all()) for tensor in whole.values())
    placement = ExpertPlacement(4, 3, ((1,), (0,), (0, 1), (1,)))
    for rank in range(3):
        torch.manual_seed(rank)
        part = _state(_model(spec, placement, rank, seed=7))
        held = {
            name for name in whole if (".experts." not in name) or int(name.split(".")[3]) in placement.experts_of(rank)
        }
        assert set(part) == held
        assert all(torch.equal(part[name], whole[name]) for name in held)
    other = _state(_model(spec, seed=8))
    changed = {name for name in whole if not torch.equal(whole[name], other[name])}
    assert changed == {name for name in whole if not name.endswith("correction_bias_E")}


def test_its_own_init_weights_comes_last_and_leaves_moe_layers_alone(tmp_path: Path) -> None:
    model = _model(own_spec(tmp_path, linear(layers=LAYER, forward=THROUGH, methods=LATER)), seed=2)
    state = _state(model)
    assert bool((state["model.embedding.weight"] == 2.5).all() and (state["model.head.bias"] == 2.5).all())
    assert 0.001 < float(state["model.moe.experts.0.gate_up"].std()) < 0.1


def test_init_weights_does_not_change_the_routes_of_an_exact_run(tmp_path: Path) -> None:
    spec = own_spec(tmp_path, EXPERTS)
    exact = build_model(spec, VOCAB, replace(single_rank(spec), is_exact=True))
    exact.init_weights(0)
    torch.testing.assert_close(exact(TOKENS), _model(spec)(TOKENS))


def test_building_does_not_change_torchs_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    _model(own_spec(tmp_path, linear()))
    assert torch.equal(torch.get_rng_state(), before)


def test_documents_reach_a_model_that_takes_them(tmp_path: Path) -> None:
    forward = "return self.head(self.embedding(tokens)) * (1 if documents_BT is None else documents_BT[..., None])"
    model = _model(own_spec(tmp_path, linear(more=", documents_BT=None", forward=forward)))
    torch.testing.assert_close(model(TOKENS, None, torch.full_like(TOKENS, 2)), model(TOKENS) * 2)
    losses_BT = model.token_losses(TOKENS, TOKENS, documents_BT=torch.zeros_like(TOKENS))
    torch.testing.assert_close(losses_BT, torch.full(TOKENS.shape, math.log(VOCAB)))
    with pytest.raises(EntrypointError, match=r"isolate_documents is true.*no parameter documents_BT"):
        _model(own_spec(tmp_path, linear(more=", targets=None")))(TOKENS, TOKENS, TOKENS)


def test_buffers_that_build_recomputes_are_no_state(tmp_path: Path) -> None:
    layers = "self.register_buffer('mask', torch.ones(4, 4).tril().bool(), persistent=False)"
    _, buffers = catalogue(own_spec(tmp_path, linear(layers=layers)), VOCAB)
    assert buffers == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lower precision": (
        {"layers": "self.half = nn.Linear(2, 2).half()"},
        r"half.weight, half.bias are not float32",
    ),
    "frozen": ({"init": "self.head.bias.requires_grad_(False)"}, r"parameters head.bias need no gradient; register"),
    "lazy": ({"layers": "self.lazy = nn.LazyLinear(2)"}, r"lazy.weight, lazy.bias have no elements; give"),
    "no elements": ({"layers": "self.none = nn.Parameter(torch.zeros(0))"}, r"parameters none have no elements"),
    "buffer": (
        {"layers": "self.register_buffer('mask', torch.ones(4).bool())"},
        r"buffers mask are not float32.*persistent=False",
    ),
    "batch norm": (
        {"layers": "self.norm = nn.BatchNorm1d(2)"},
        r"norm.num_batches_tracked are of running .*use LayerNorm",
    ),
    "experts by name": (
        {"layers": "self.a = nn.Module(); self.a.experts = nn.ModuleList([nn.Linear(2, 2)])"},
        r"a.experts.0.weight, a.experts.0.bias have names of the form \*\.experts\.NUMBER",
    ),
    "other experts": (
        {"layers": "self.moe = MoELayer(spec, ExpertParallelContext(ExpertPlacement.balanced(4, 2), 0, None))"},
        r"moe must be MoELayer\(spec, experts\) with the `experts` that build was given",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        build_model(*_arguments(own_spec(tmp_path, linear(**change))))


def _arguments(spec: ModelSpec) -> tuple[ModelSpec, int, ExpertParallelContext]:
    return spec, VOCAB, single_rank(spec)


NO_MODEL = {
    "a class of parameters": ("build = lambda *a: {}", r"returned a dict"),
    "raises": ("def build(*a):\n    raise ValueError('sizes')", r"own_\d+:build raised ValueError: sizes"),
    "does not import": ("import no_such_package", r"can't be imported: ModuleNotFoundError: No module named 'no_such"),
    "ends": ("raise SystemExit(3)", r"can't be imported: SystemExit: 3"),
    "another name": ("def build_it(): pass", r"has no function build"),
    "no parameters": ("from torch import nn\nbuild = lambda *a: nn.Identity()", r"it has no parameter"),
}


@pytest.mark.parametrize(("source", "message"), NO_MODEL.values(), ids=NO_MODEL.keys())
def test_what_is_no_model_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        build_model(*_arguments(own_spec(tmp_path, source)))


def test_the_traceback_is_the_users_alone(tmp_path: Path) -> None:
    source = "def inner():\n    return 1 / 0\n\ndef build(*a):\n    return inner()\n"
    spec = own_spec(tmp_path, source)
    with pytest.raises(EntrypointError) as caught:
        build_model(*_arguments(spec))
    lines = caught.value.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ZeroDivisionError: division by zero"
    files = [line for line in lines if line.startswith("  File")]
    assert len(files) == 2 and all(str(tmp_path) in line for line in files)


def test_another_shape_than_that_of_logits_is_refused(tmp_path: Path) -> None:
    for forward, got in (("return self.embedding(tokens)", r"shape \(2, 12, 16\)"), ("return (tokens,)", "a tuple")):
        with pytest.raises(EntrypointError, match=rf"returned a?.*{got}.*\(2, 12, 50\)"):
            _model(own_spec(tmp_path, linear(forward=forward)))(TOKENS)


def test_weights_that_only_some_ranks_build_are_refused(tmp_path: Path) -> None:
    layers = "self.more = nn.Linear(2, 2) if experts.local_experts else None"
    model = build_model(*_arguments(own_spec(tmp_path, linear(layers=layers))))
    with pytest.raises(EntrypointError, match=r"builds more.weight, more.bias only where it is given experts"):
        model.init_weights(0)


def test_an_error_of_the_forward_pass_is_known_as_the_users(tmp_path: Path) -> None:
    model = _model(own_spec(tmp_path, linear(forward="return self.nothing")))
    for call in (model, model.outputs):
        with pytest.raises(AttributeError) as caught:
            call(TOKENS)
        assert raised_by_forward(caught.value)
    assert not raised_by_forward(ValueError())
