"""The groups and the parameter groups of one process: what needs no peer to be checked."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.layout import PARTITION_MULTIPLE
from orchestrator.elastic.placement import Placement
from orchestrator.engine.groups import Groups, connect, disconnect
from orchestrator.engine.param_groups import groups_of
from orchestrator.model.base import expert_of
from orchestrator.model.moe import ExpertHome
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.model import ModelSpec

SPEC = ModelSpec(hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=3, expert_intermediate_size=4)


@pytest.fixture
def alone() -> Iterator[Groups]:
    yield connect(HashStore(), "test", 0, Placement.balanced(3, 1), "gloo")
    disconnect()


def test_a_world_of_one_exchanges_with_nobody(alone: Groups) -> None:
    assert alone.exchange is None
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.replicas == (alone.world,)


def test_generations_may_follow_each_other_on_one_store() -> None:
    store = HashStore()
    for generation in range(3):
        groups = connect(store, f"1/{generation}", 0, Placement.balanced(3, 1), "gloo")
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.world)
        assert total.item() == 1
        disconnect()
    disconnect()  # harmless where nothing is connected
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(Placement.balanced(3, 2), id="uneven"),
        pytest.param(Placement(3, 2, ((0,), (0,), (0,))), id="a rank without experts"),
        pytest.param(Placement(3, 3, ((0, 1), (1, 2), (0,))), id="overlapping holders"),
    ],
)
def test_every_rank_has_equally_many_groups_and_a_filler_where_it_holds_nothing(
    alone: Groups, placement: Placement
) -> None:
    for rank in range(placement.world_size):
        model = MoELanguageModel(SPEC, 20, ExpertHome(placement, rank, None))
        name_of = {id(param): name for name, param in model.named_parameters()}
        groups = Groups(rank, placement.world_size, placement, alone.world, (alone.world,) * len(placement.groups()))
        dense, *of_experts = groups_of(model, groups)
        named = [name_of[id(p)] for p in dense["params"] if id(p) in name_of]
        assert named == [n for n in name_of.values() if expert_of(n) is None]
        assert not any(hasattr(p, "group_name") for p in dense["params"])
        assert len(of_experts) == len(placement.groups())
        for colour, group in enumerate(of_experts):
            mine = {e for e in placement.experts_of(rank) if placement.colour_of(e) == colour}
            held = {expert_of(name_of[id(p)]) for p in group["params"] if id(p) in name_of}
            assert held == mine
            assert group["moe"] and {p.group_name for p in group["params"]} == {group["name"]}
            assert mine or len(group["params"]) == 1
            assert sum(p.numel() for p in group["params"]) % PARTITION_MULTIPLE == 0
            assert all(not p.any() for p in group["params"] if id(p) not in name_of)


def test_a_model_without_experts_has_the_dense_group_alone(alone: Groups) -> None:
    spec = SPEC.model_copy(update={"num_dense_layers": 2})
    model = MoELanguageModel(spec, 20, ExpertHome(Placement.balanced(3, 1), 0, None))
    (dense,) = groups_of(model, alone)
    assert len(dense["params"]) == len(list(model.parameters()))
