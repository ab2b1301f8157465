"""Clones of experts: right after a growth the model computes what it did before, by every router."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.elastic.expert_change import ExpertChange, ExpertSet, cloned
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import BUFFER, MASTER, PARAM, Inventory
from orchestrator.model.factory import build_model, catalogue, single_rank
from orchestrator.model.moe.routing.balance import RoutingCounts
from orchestrator.model.moe.routing.limit import OneOfFamily
from orchestrator.model.moe.routing.saliency import KEPT, NORM_UNIT, next_saliency
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.transition.clone_changes import change_clones
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

GROWTH = ExpertChange(5, 4, cloned(4, 12))
VOCAB = 40


def _job(**model: Any) -> JobSpec:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"moe_intermediate_size": 8, "intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return JobSpec.model_validate({"schema": "v1", "name": "families", "model": {**sizes, **model}})


def _tensors(job: JobSpec, num_experts: int) -> Inventory:
    job = job.with_experts(num_experts)
    params, buffers = catalogue(job.model, VOCAB)
    return inventory(params, job, buffers)


def _grown(job: JobSpec, model: MoELanguageModel, change: ExpertChange = GROWTH) -> tuple[Any, StateMap]:
    """The model after a growth, and the map by which it was made."""
    mapped = StateMap(_tensors(job, 4), _tensors(job, change.num_experts), job.model.moe_layers, change)
    spec = job.with_experts(change.num_experts).model
    grown: Any = build_model(spec, VOCAB, single_rank(spec, ExpertSet(4).after(change)))
    before, after = _values(model), _values(grown)
    for name, tensor in after.items():
        for start, stop, old, first in mapped.pieces[name]:
            tensor[start:stop] = before[old][first : first + stop - start]
    return grown, mapped


def _values(model: Any) -> dict[str, Tensor]:
    held = {f"{PARAM}/{name}": param.data.view(-1) for name, param in model.named_parameters()}
    return held | {f"{BUFFER}/{name}": buffer.view(-1) for name, buffer in model.state_buffers()}


def _model(spec: ModelSpec) -> Any:
    model = build_model(spec, VOCAB, single_rank(spec))
    model.init_weights(3)
    for layer in model.moe_layers if spec.bias_update_speed else ():
        layer.correction_bias_E.copy_(torch.tensor([0.02, -0.01, 0.0, 0.03]))
    return model


@pytest.mark.parametrize(
    "router",
    [
        {},
        {"router": {"scorer": "attention", "rank": 4}},
        {"router": {"scorer": "context", "rank": 4, "num_heads": 2}},
        {"scoring_func": "softmax"},
        {"norm_topk_prob": False, "bias_update": "sign"},
    ],
)
def test_a_grown_model_computes_what_it_did_before(router: dict[str, Any]) -> None:
    with devices.device():
        job = _job(**router)
        model = _model(job.model)
        grown, _ = _grown(job, model)
        tokens_BT = torch.arange(60).view(3, 20) % VOCAB
        with torch.no_grad():
            before, after = model(tokens_BT), grown(tokens_BT)
    if job.model.scoring_func == "sigmoid":
        assert torch.equal(before, after)
    assert torch.allclose(before, after, atol=1e-5)
    for layer, other in zip(model.moe_layers, grown.moe_layers, strict=True):
        assert torch.equal(other.last_counts_E[:4], layer.last_counts_E)  # all tokens are with the first members
        assert not other.last_counts_E[4:].any()


def test_a_token_visits_the_best_member_of_each_family_and_ties_go_to_the_first() -> None:
    families = (0, 1, 0, 2, 1, 0)
    limit = OneOfFamily(families).to(devices.device())
    choice_NE = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).round(decimals=1).to(devices.device())
    limited_NE, margin_NE = limit(choice_NE)
    for choice_E, limited_E, margin_E in zip(choice_NE.tolist(), limited_NE.tolist(), margin_NE.tolist(), strict=True):
        for family in range(3):
            members = [expert for expert in range(6) if families[expert] == family]
            best = max(members, key=lambda expert: (choice_E[expert], -expert))
            for expert in members:
                others = [choice_E[other] for other in members if other != expert]
                assert limited_E[expert] == (choice_E[expert] if expert == best else float("-inf"))
                wanted = choice_E[expert] - max(others) if others else float("inf")
                assert margin_E[expert] == pytest.approx(wanted, abs=1e-6)


def test_families_that_another_limit_excludes_stay_excluded() -> None:
    limit = OneOfFamily((0, 0, 1, 1)).to(devices.device())
    nothing = float("-inf")
    limited_NE, margin_NE = limit(torch.tensor([[nothing, nothing, 0.5, 0.2]], device=devices.device()))
    assert limited_NE.tolist() == [[nothing, nothing, 0.5, nothing]]
    assert margin_NE[0, :2].tolist() == [float("inf")] * 2 and not margin_NE.isnan().any()


@pytest.mark.parametrize("norms", [True, False])
def test_saliency_is_the_mean_norm_of_weighted_outputs(norms: bool) -> None:
    with devices.device():
        job = _job(num_hidden_layers=2, first_k_dense_replace=1)
        home = replace(single_rank(job.model), keeps_saliency=norms)
        model: Any = build_model(job.model, VOCAB, home)
        model.init_weights(3)
        (layer,) = model.moe_layers
        seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        tokens_BT = torch.arange(60).view(3, 20) % VOCAB
        model(tokens_BT, tokens_BT.roll(1, 1)).backward()
        routed = model.routing_counts()
        if not norms:
            assert routed.norms_LE.shape == (1, 0)
            return
        x_ND = seen[0].reshape(-1, 16)
        routing = layer.router(x_ND)
        wanted_E = torch.zeros(4, dtype=torch.float64, device="cpu")
        for expert in range(4):
            for token, choice in (routing.expert_ids_NK == expert).nonzero().tolist():
                y_D = layer.experts[str(expert)](x_ND[token : token + 1]) * routing.gates_NK[token, choice]
                wanted_E[expert] += float(y_D.norm().detach())
        found_E = routed.norms_LE[0].double().cpu() * NORM_UNIT
    assert torch.allclose(found_E, wanted_E, rtol=1e-4)
    again = next_saliency(torch.ones(1, 4, 2, device="cpu"), RoutingCounts(*(part.cpu() for part in routed.parts)))
    assert torch.allclose(again[0, :, 0].double(), KEPT + wanted_E, rtol=1e-4)
    assert torch.allclose(again[0, :, 1].double(), KEPT + routed.counts_LE[0].cpu().double())


def _ranges(model: Any, job: JobSpec) -> NamedRanges:
    """The state of a bf16 model in a world of one, each tensor of it with values of its own."""
    ranges = NamedRanges()
    for name, tensor in _tensors(job, 12).items():
        plain = name.partition("/")[2]
        params = dict(model.named_parameters())
        values = params[plain].data.view(-1).clone() if plain in params else torch.ones(tensor.numel)
        kind = name.partition("/")[0]
        values = values if kind in (PARAM, MASTER) else torch.ones(tensor.numel, device=values.device)
        ranges.add(name, 0, values.bfloat16() if tensor.dtype == "bfloat16" else values)
    return ranges


def test_noise_and_redrawn_units_change_clones_alone() -> None:
    with devices.device():
        job = _job()
        change = replace(GROWTH, noise=0.5, reinit_ratio=0.25)
        grown, mapped = _grown(job, _model(job.model), change)
        before, after = _ranges(grown, job), _ranges(grown, job)
        change_clones(after, mapped, seed=1)
        again = _ranges(grown, job)
        change_clones(again, mapped, seed=1)
        other = _ranges(grown, job)
        change_clones(other, mapped, seed=2)
    changed = {n for n, held in after if not torch.equal(held.data, before.view(n, held.start, held.stop))}
    assert all(torch.equal(held.data, again.view(n, held.start, held.stop)) for n, held in after)
    assert any(not torch.equal(held.data, other.view(n, held.start, held.stop)) for n, held in after)
    router = "param/layers.1.mlp.router.scorer.weight"
    clones = {name for expert in range(4, 12) for name in mapped.new if f".experts.{expert}." in name}
    assert changed == clones | {router}
    rows_ED = (after.view(router, 0, 12 * 16) - before.view(router, 0, 12 * 16)).view(12, 16)
    assert not rows_ED[:4].any() and rows_ED[4:].all()
    std = before.view(router, 0, 12 * 16).std()
    assert float(rows_ED[4:].std() / std) == pytest.approx(0.5, rel=0.2)
    for name, (rows, columns) in (("gate_up", (16, 16)), ("down", (16, 8))):
        tensor = f"param/layers.1.mlp.experts.7.{name}"
        is_new = after.view(tensor, 0, rows * columns) != before.view(tensor, 0, rows * columns)
        units = is_new.view(rows, columns).any(1) if name == "gate_up" else is_new.view(rows, columns).any(0)
        assert int(units.sum()) == (4 if name == "gate_up" else 2)  # a quarter of 8 units, gates and ups
        moments = after.view(tensor.replace("param", "exp_avg"), 0, rows * columns)
        assert torch.equal(moments == 0, is_new)
