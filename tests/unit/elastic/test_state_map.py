"""Maps of states to other experts: element by element against the definition, and carried out on plain tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.elastic.expert_change import ExpertChange, cloned, of_layer
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_map import StateMap
from orchestrator.elastic.state_spec import FACTORS, Inventory, Sharing, StateTensor, expert_of
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.model.factory import catalogue
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.job import JobSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.relabelling import relabelled
from orchestrator.state.transfer import keep

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "n_routed_experts": 4,
    "router": {"scorer": "context", "rank": 3, "num_heads": 2},
}
CHANGES = (
    ExpertChange(1, 4, cloned(4, 12)),
    ExpertChange(1, 4, ((0, 3), (1, 2))),
    ExpertChange(1, 4, ((3, 3, 0, 1, 2, 2, 1, 0),)),
)


def _job(optimizer: str, precision: str) -> JobSpec:
    train = {"optimizer": {"name": optimizer}, "precision": precision, "ema": {"decay": 0.9}}
    return JobSpec.model_validate({"schema": "v1", "name": "map", "model": SIZES, "train": train})


def _tensors(job: JobSpec, num_experts: int) -> Inventory:
    job = job.with_experts(num_experts)
    params, buffers = catalogue(job.model, 50, keeps_saliency=True)
    return inventory(params, job, buffers)


def _map(change: ExpertChange, optimizer: str = "adamw", precision: str = "bf16") -> StateMap:
    job = _job(optimizer, precision)
    return StateMap(_tensors(job, 4), _tensors(job, change.num_experts), job.model.moe_layers, change)


def _wanted(mapped: StateMap, tensor: StateTensor, values: dict[str, Tensor]) -> Tensor:
    """A new tensor's values by the definition."""
    number = {layer: index for index, layer in enumerate(mapped.layers)}
    layer = next((name for name in number if f"/{name}." in tensor.name), None)
    if layer is None:
        return values[tensor.name]
    sources = list(of_layer(mapped.change.sources, number[layer]))
    if (expert := expert_of(tensor.name)) is not None:
        return values[tensor.name.replace(f"experts.{expert}.", f"experts.{sources[expert]}.")]
    before = mapped.old[tensor.name]
    if before.shape == tensor.shape:
        return values[tensor.name]
    flat = values[tensor.name]
    if tensor.name.startswith(FACTORS):
        rows = before.numel - (tensor.numel - tensor.like.rows) if tensor.like else 0
        heads = rows // 4
        return torch.cat([flat[:rows].view(heads, 4)[:, sources].flatten(), flat[rows:]])
    heads = before.shape[0] // 4
    return flat.view(heads, 4, -1)[:, sources].flatten()


def _held(layout: StateLayout, worker: str, values: dict[str, Tensor]) -> NamedRanges:
    held = NamedRanges()
    for tensor, start, stop in layout.ranges_of(worker).tolist():
        name = layout.names[tensor]
        held.add(name, start, values[name][start:stop].clone())
    return held


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "sgd"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_mapped_state_is_what_the_definition_says(change: ExpertChange, optimizer: str) -> None:
    mapped = _map(change, optimizer)
    values = {name: torch.randn(tensor.numel) for name, tensor in mapped.old.items()}
    for name, tensor in mapped.new.items():
        wanted, found = _wanted(mapped, tensor, values), torch.full((tensor.numel,), float("nan"))
        for start, stop, old, first in mapped.pieces[name]:
            found[start:stop] = values[old][first : first + stop - start]
        assert torch.equal(found, wanted), name
        begin, end = tensor.numel // 3, tensor.numel // 3 + max(tensor.numel // 2, 1)
        part = [
            values[old][first : first + stop - start] for start, stop, old, first in mapped.within(name, begin, end)
        ]
        assert torch.equal(torch.cat(part), wanted[begin:end])


@settings(deadline=None, max_examples=25)
@given(
    change=st.sampled_from(CHANGES),
    optimizer=st.sampled_from(["adamw", "muon", "adafactor"]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_a_transfer_from_a_relabelled_state_gives_each_worker_its_new_ranges(
    change: ExpertChange, optimizer: str, sizes: tuple[int, int]
) -> None:
    mapped = _map(change, optimizer)
    values = {name: torch.randn(tensor.numel) for name, tensor in mapped.old.items()}
    wanted = {name: _wanted(mapped, tensor, values) for name, tensor in mapped.new.items()}
    worlds = [World(n, tuple(f"w{(i + n) % 6}" for i in range(size))) for n, size in enumerate(sizes)]
    placements = (ExpertPlacement.balanced(4, sizes[0]), ExpertPlacement.balanced(change.num_experts, sizes[1]))
    before = training_layout(mapped.old, placements[0], worlds[0], CommunicationSpec())
    old = mapped.relabelled(before)
    new = training_layout(mapped.new, placements[1], worlds[1], CommunicationSpec())
    for worker in worlds[0].members:  # the same ranges as the layout says, with the right values
        ranges = relabelled(_held(before, worker, values), mapped)
        for tensor, start, stop in old.ranges_of(worker).tolist():
            name = old.names[tensor]
            assert torch.equal(ranges.view(name, start, stop), wanted[name][start:stop])
    plan = TransferPlan.between(old, new)
    for worker in worlds[1].members:
        mine, empty = plan.for_worker(worker), _held(new, worker, {n: torch.zeros_like(v) for n, v in wanted.items()})
        if worker in worlds[0].members:
            keep(plan, mine.keeps, relabelled(_held(before, worker, values), mapped), empty)
        for source, rows in mine.receives.items():
            theirs = relabelled(_held(before, source, values), mapped)
            for tensor, start, stop in rows.tolist():
                name = plan.names[tensor]
                empty.view(name, start, stop).copy_(theirs.view(name, start, stop))
        for name, part in empty:
            if mapped.new[name].sharing is not Sharing.PARTIAL:
                assert torch.equal(part.data, wanted[name][part.start : part.stop]), name


def test_a_growth_in_place_moves_no_expert() -> None:
    mapped = _map(CHANGES[0], precision="fp32")
    world = World(0, ("w0", "w1"))
    held = ExpertPlacement(12, 2, tuple(ExpertPlacement.balanced(4, 2).holders[e] for e in range(4)) * 3)
    old = mapped.relabelled(training_layout(mapped.old, ExpertPlacement.balanced(4, 2), world, CommunicationSpec()))
    new = training_layout(mapped.new, held, World(1, world.members), CommunicationSpec())
    moved = {old.names[tensor] for tensor in TransferPlan.between(old, new).moves[:, 0]}
    assert not any(expert_of(name) is not None for name in moved)


def test_a_tensor_without_rows_by_expert_is_refused() -> None:
    mapped = _map(CHANGES[0])
    name = "buffer/layers.1.mlp.router.correction_bias_E"
    odd = StateTensor(name, (13,), mapped.new[name].sharing, mapped.new[name].origin)
    with pytest.raises(ValueError, match="has no row for each expert"):
        _ = StateMap(mapped.old, {name: odd}, mapped.layers, mapped.change).pieces


def test_maps_of_large_models_take_little_time() -> None:
    """A model of 24 layers and 128 experts: the map and its layout are made while the old world trains."""
    job = JobSpec.model_validate(
        {
            "schema": "v1",
            "name": "large",
            "model": {**SIZES, "num_hidden_layers": 24, "n_routed_experts": 64, "router": "linear"},
        }
    )
    mapped = StateMap(_tensors(job, 64), _tensors(job, 128), job.model.moe_layers, ExpertChange(1, 64, cloned(64, 128)))
    layout = training_layout(
        mapped.old, ExpertPlacement.balanced(64, 8), World(0, tuple("abcdefgh")), CommunicationSpec()
    )
    assert np.array_equal(mapped.relabelled(layout).numel, [tensor.numel for tensor in mapped.new.values()])
