"""The layout of the training state, against ZeRO's partition written down plainly, element by element."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout, filler_per_rank
from orchestrator.elastic.state_spec import ParamSpec, Sharing
from orchestrator.elastic.world import World
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.optimizer import OptimizerSpec
from tests.support.layouts import layout_of_state
from tests.unit.elastic.layouts import tensor_of


def plain_owners(params: list[ParamSpec], placement: ExpertPlacement, bucket: float) -> dict[tuple[str, int], int]:
    """The rank that optimizes each (parameter, element): flatten each bucket, pad it, cut it evenly."""
    groups: dict[tuple[str, tuple[int, ...], int], list[tuple[str, int]]] = defaultdict(list)
    number: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for spec in reversed(params):
        everyone = tuple(range(placement.world_size))
        key = ("dense", everyone) if spec.expert is None else ("expert", placement.holders[spec.expert])
        if groups[*key, number[key]] and len(groups[*key, number[key]]) + spec.numel > bucket:
            number[key] += 1
        groups[*key, number[key]][:0] = [(spec.name, i) for i in range(spec.numel)]
    owner = {}
    for (_, ranks, _), elements in groups.items():
        padded = len(elements)
        while padded % (16 * len(ranks)):
            padded += 1
        for position, element in enumerate(elements):
            owner[element] = ranks[position // (padded // len(ranks))]
    return owner


@st.composite
def models(draw: st.DrawFn) -> tuple[list[ParamSpec], ExpertPlacement]:
    num_experts, world_size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    ranks = st.sets(st.integers(0, world_size - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    uneven = st.tuples(*[ranks] * num_experts).map(lambda holders: ExpertPlacement(num_experts, world_size, holders))
    placement = draw(uneven | st.just(ExpertPlacement.balanced(num_experts, world_size)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(0, num_experts - 1)), max_size=8))
    return [ParamSpec(f"p{i}", (numel,), expert) for i, (numel, expert) in enumerate(shapes)], placement


def world_of(size: int) -> World:
    return World(0, tuple(f"w{i}" for i in range(size)))


@settings(deadline=None)
@given(models(), st.booleans(), st.integers(1, 40))
def test_every_element_is_where_zero_puts_it(
    model: tuple[list[ParamSpec], ExpertPlacement], mixed_precision: bool, bucket: int
) -> None:
    params, placement = model
    world = world_of(placement.world_size)
    communication = CommunicationSpec(bucket_mb=bucket * 4 / 2**20)
    layout = layout_of_state(params, placement, world, mixed_precision, [("bias", (3,))], communication)
    owner = plain_owners(params, placement, bucket)

    held: dict[str, set[tuple[str, int]]] = {}
    for worker in world.members:
        held[worker] = {
            (layout.names[tensor], i)
            for tensor, start, stop in layout.ranges_of(worker).tolist()
            for i in range(start, stop)
        }
    for rank, worker in enumerate(world.members):
        mine = set(placement.experts_of(rank))
        expected = {("buffer/bias", i) for i in range(3)}
        for spec in params:
            if spec.expert is None or spec.expert in mine:
                expected |= {(f"param/{spec.name}", i) for i in range(spec.numel)}
            owned = [i for i in range(spec.numel) if owner[spec.name, i] == rank]
            for prefix in ("exp_avg", "exp_avg_sq") + (("master",) if mixed_precision else ()):
                expected |= {(f"{prefix}/{spec.name}", i) for i in owned}
        assert held[worker] == expected

    item_bytes = dict(zip(layout.names, layout.itemsize.tolist(), strict=True))
    expected_bytes = [sum(item_bytes[name] for name, _ in held[worker]) for worker in world.members]
    assert layout.bytes_per_rank().tolist() == expected_bytes


@pytest.mark.parametrize(("rule", "kind"), [("muon", "momentum_buffer"), ("adafactor", "exp_avg_sq_factors")])
@settings(deadline=None)
@given(models(), st.integers(1, 40))
def test_a_matrix_is_whole_on_one_of_its_holders(
    rule: str, kind: str, model: tuple[list[ParamSpec], ExpertPlacement], bucket: int
) -> None:
    params, placement = model
    params = [ParamSpec(f"{p.name}.query", (p.numel, 3), p.expert) for p in params] + [ParamSpec("norm", (5,), None)]
    world, optimizer = world_of(placement.world_size), OptimizerSpec.model_validate({"name": rule})
    communication = CommunicationSpec(bucket_mb=bucket * 4 / 2**20)
    layout = layout_of_state(params, placement, world, False, [], communication, optimizer)
    for tensor, start, stop, rank in layout.shards.tolist():
        spec = layout.tensors[layout.names[tensor]]
        assert spec.like is not None
        assert spec.name.startswith(f"{kind}/") == (spec.like.name != "norm" or rule == "adafactor")
        if spec.like.name != "norm":
            assert (start, stop) == (0, spec.numel)
            assert spec.like.expert is None or rank in placement.holders[spec.like.expert]
    updated = [(name, span) for rank in range(world.size) for name, span in layout.updates_of(rank).items()]
    sizes = {spec.name: spec.numel for spec in params}
    assert all(span == (0, sizes[name]) for name, span in updated if name != "norm")
    assert {name for name, _ in updated} == set(sizes)


def test_parameters_with_another_learning_rate_are_cut_apart() -> None:
    params = [ParamSpec(name, (48,), None) for name in ("a", "b", "c")]
    groups = {"groups": [{"params": ["b"], "lr_scale": 0.5}]}
    for optimizer, wanted in ((None, 3), (OptimizerSpec.model_validate(groups), 7)):
        layout = layout_of_state(params, ExpertPlacement.balanced(1, 3), world_of(3), False, [], optimizer=optimizer)
        of_average = [row for row in layout.shards.tolist() if layout.names[row[0]].startswith("exp_avg/")]
        assert len(of_average) == wanted


def test_names_do_not_depend_on_the_world() -> None:
    params = [ParamSpec("e0", (2,), 0), ParamSpec("w", (4,), None), ParamSpec("e1", (2,), 1)]
    names = {
        layout_of_state(params, ExpertPlacement.balanced(2, n), world_of(n), True, [("b", (1,))]).names
        for n in (1, 2, 5)
    }
    assert len(names) == 1


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="placement is for 2 ranks; the world has 3"):
        layout_of_state([], ExpertPlacement.balanced(2, 2), world_of(3), False, [])
    with pytest.raises(ValueError, match="e belongs to expert 2"):
        layout_of_state([ParamSpec("e", (1,), 2)], ExpertPlacement.balanced(2, 2), world_of(2), False, [])


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        pytest.param([(0, 0, 3, 0)], "cover", id="gap_at_the_end"),
        pytest.param([(0, 0, 2, 0), (0, 3, 4, 1)], "cover", id="gap_inside"),
        pytest.param([(0, 0, 3, 0), (0, 2, 4, 1)], "cover", id="overlap"),
        pytest.param([(0, 2, 4, 1), (0, 0, 2, 0)], "cover", id="unsorted"),
        pytest.param([(0, 0, 5, 0)], "beyond", id="too_long"),
        pytest.param([(0, 0, 4, 2)], "outside the world", id="no_such_rank"),
        pytest.param([(1, 0, 4, 0)], "not sharded", id="no_such_tensor"),
    ],
)
def test_shards_that_do_not_cover_are_refused(shards: list[tuple[int, int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StateLayout(
            world=world_of(2),
            tensors={"t": tensor_of("t", Sharing.SHARDED, 4)},
            holder_sets=(),
            holder_set=np.array([-1]),
            shards=np.array(shards),
        )


def test_whole_parameters_on_many_ranks_need_filler() -> None:
    params = [ParamSpec("embedding.weight", (1000, 8), None), ParamSpec("a.query", (8, 8), None)]
    placement, communication = ExpertPlacement.balanced(1, 8), CommunicationSpec()
    wanted = {"adamw": 0, "muon": 7 * 64 + 64, "adafactor": 8 * 8000 - 8064}  # Muon leaves the embedding to AdamW
    for rule, filler in wanted.items():
        optimizer = OptimizerSpec.model_validate({"name": rule})
        layout = layout_of_state(params, placement, world_of(8), False, [], communication, optimizer)
        found = filler_per_rank(layout.tensors, placement, communication)
        assert found.tolist() == [filler] * 8, rule
