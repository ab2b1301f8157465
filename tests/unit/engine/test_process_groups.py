"""The groups and the parameter groups of one process: what needs no peer to be checked."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.bucket_partition import PIECE_MULTIPLE
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_spec import expert_of
from orchestrator.engine.param_groups import group_name, groups_of
from orchestrator.engine.process_groups import ProcessGroups, connect, disconnect
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.optimizer import OptimizerSpec

SPEC = ModelSpec(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    n_routed_experts=3,
    moe_intermediate_size=4,
)


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    yield connect(HashStore(), "test", 0, ExpertPlacement.balanced(3, 1), "gloo")
    disconnect()


def test_a_world_of_one_exchanges_nothing(alone: ProcessGroups) -> None:
    assert alone.exchange is None
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.replicas == (alone.world,)


def test_generations_may_follow_each_other_on_one_store() -> None:
    store = HashStore()
    for generation in range(3):
        groups = connect(store, f"1/{generation}", 0, ExpertPlacement.balanced(3, 1), "gloo")
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.world)
        assert total.item() == 1
        disconnect()
    disconnect()  # harmless where nothing is connected
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(ExpertPlacement.balanced(3, 2), id="uneven"),
        pytest.param(ExpertPlacement(3, 2, ((0,), (0,), (0,))), id="a rank without experts"),
        pytest.param(ExpertPlacement(3, 3, ((0, 1), (1, 2), (0,))), id="overlapping holders"),
    ],
)
def test_groups_hold_parameters_of_the_same_ranks(alone: ProcessGroups, placement: ExpertPlacement) -> None:
    """In buckets, the last parameters first; a rank that holds nothing of a colour has a filler there."""
    for rank in range(placement.world_size):
        model = MoELanguageModel(SPEC, 20, ExpertParallelContext(placement, rank, None))
        named = list(model.named_parameters())
        name_of = {id(param): name for name, param in named}
        replicas = (alone.world,) * len(placement.groups())
        groups = ProcessGroups(rank, placement.world_size, placement, alone.world, alone.reduction, replicas)
        found = groups_of(model, groups, CommunicationSpec(bucket_mb=0.0005), OptimizerSpec())
        dense = [name_of[id(p)] for group in found if group.is_dense for p in group.params]
        assert sorted(dense) == sorted(n for n in name_of.values() if expert_of(n) is None)
        assert len([group for group in found if group.is_dense]) > 3
        for colour in range(len(placement.groups())):
            of_colour = [group for group in found if group.name == group_name(colour)]
            mine = {e for e in placement.experts_of(rank) if placement.colours[placement.holders[e]] == colour}
            assert {expert_of(name_of[id(p)]) for group in of_colour for p in group.params} == mine
            assert all(group.for_deepspeed()["moe"] for group in of_colour)
            assert {p.group_name for group in of_colour for p in group.everything} == {group_name(colour)}
            assert mine or [(len(group.params), group.numel) for group in of_colour] == [(0, PIECE_MULTIPLE)]
        assert all(group.numel % PIECE_MULTIPLE == 0 for group in found)
        fillers = [p for group in found for p in group.everything if all(p is not member for member in group.params)]
        assert not any(filler.any() for filler in fillers)
        order = [[*name_of].index(id(group.params[0])) for group in found if group.params]
        assert order == sorted(order, reverse=True)


def test_a_model_without_experts_has_dense_groups_alone(alone: ProcessGroups) -> None:
    spec = SPEC.model_copy(update={"first_k_dense_replace": 2})
    model = MoELanguageModel(spec, 20, ExpertParallelContext(ExpertPlacement.balanced(3, 1), 0, None))
    (dense,) = groups_of(model, alone, CommunicationSpec(), OptimizerSpec())
    assert {id(p) for p in dense.everything} == {id(p) for p in model.parameters()}


def test_parameters_with_other_settings_have_separate_buckets(alone: ProcessGroups) -> None:
    model = MoELanguageModel(SPEC, 20, ExpertParallelContext(ExpertPlacement.balanced(3, 1), 0, None))
    name_of = {id(param): name for name, param in model.named_parameters()}
    optimizer = OptimizerSpec.model_validate(
        {"name": "muon", "groups": [{"params": ["head"], "name": "lion", "lr_scale": 0.5}]}
    )
    found = groups_of(model, alone, CommunicationSpec(), optimizer)
    by_update = {group.update: {name_of[id(p)] for p in group.params} for group in found if group.is_dense}
    assert by_update["lion", 0.5] == {"head"}
    assert "layers.0.attention.query" in by_update["muon", 1.0] and "embedding.weight" in by_update["adamw", 1.0]
    assert not any("norm" in name or "router" in name for name in by_update["muon", 1.0])
    for group in found:
        end = 0
        at = {id(p): start for p, start in zip(group.params, group.starts, strict=True)}
        for param in group.everything:
            assert at.get(id(param), end) == end
            end += param.numel()
        assert [*group.for_deepspeed()["params"]] == [*group.everything] and end == group.numel
