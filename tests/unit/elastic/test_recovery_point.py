"""The newest step for which reachable workers hold every shard, and the layout of its state on them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import (
    Holding,
    RecoveryPoint,
    find_recovery_point,
    layout_at_recovery_point,
    placement_at_recovery_point,
    world_of,
)
from orchestrator.elastic.snapshot_layout import ALIGNMENT, SnapshotFormat, buddies_of
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import ITEM_BYTES, ParamSpec, Sharing
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.spec.communication import CommunicationSpec
from tests.support.layouts import layout_of_state

WORLD = World(3, ("a", "b", "c"))


def _held(**of: list[tuple[int, int]]) -> dict[str, tuple[Holding, ...]]:
    """By worker, (step, rank) of generation 3."""
    return {worker: tuple(Holding(3, step, rank) for step, rank in rows) for worker, rows in of.items()}


def test_the_newest_step_that_is_whole_counts() -> None:
    held = _held(a=[(7, 0), (8, 0), (7, 2), (8, 2)], b=[(7, 1), (7, 0)])
    assert find_recovery_point([WORLD], held) == RecoveryPoint(3, 7, ("a", "b", "a"))


def test_a_rank_is_its_own_holder_if_possible() -> None:
    held = _held(a=[(7, 0), (7, 2)], b=[(7, 1), (7, 0)], c=[(7, 2), (7, 1)])
    assert find_recovery_point([WORLD], held) == RecoveryPoint(3, 7, ("a", "b", "c"))


def test_nothing_is_whole() -> None:
    assert find_recovery_point([WORLD], _held(a=[(7, 0), (8, 2)], b=[(7, 1)])) is None
    assert find_recovery_point([World(4, ("a", "b", "c"))], _held(a=[(7, 0)], b=[(7, 1)], c=[(7, 2)])) is None


def test_snapshots_of_others_alone_are_not_enough() -> None:
    """They lack what every rank of the world had."""
    world = World(3, ("a", "b"))
    assert find_recovery_point([world], {"c": (Holding(3, 7, 0), Holding(3, 7, 1))}) is None


def test_the_snapshot_of_a_lone_rank_is_enough() -> None:
    """It has all that the rank had."""
    world, params = World(3, ("a",)), [ParamSpec("w", (4,), None), ParamSpec("expert0", (6,), 0)]
    assert find_recovery_point([world], {"c": (Holding(3, 7, 0),)}) == RecoveryPoint(3, 7, ("c",))
    layout = layout_of_state(params, ExpertPlacement.balanced(1, 1), world, True, [("bias", (3,))])
    form = SnapshotFormat.of(layout, 0)
    assert form.num_shared == len(form.names) and form.shared_bytes == form.total_bytes
    point = layout_at_recovery_point(layout, ["c"])
    assert point.world.members == ("c",)
    assert np.array_equal(point.bytes_per_rank(), layout.bytes_per_rank())


def test_at_the_same_step_the_newer_generation_counts() -> None:
    old, new = World(2, ("a",)), World(3, ("a",))
    held = {"a": (Holding(2, 7, 0), Holding(3, 7, 0))}
    assert find_recovery_point([old, new], held) == RecoveryPoint(3, 7, ("a",))


@st.composite
def _lost(draw: st.DrawFn) -> tuple[StateLayout, ExpertPlacement, list[str], tuple[str, ...]]:
    """A layout of some world, and who holds its ranks' shards when some members, none of them buddies, are gone."""
    size, experts = draw(st.integers(2, 7)), draw(st.integers(1, 9))
    world = World(0, tuple(f"w{i}" for i in range(size)))
    placement = ExpertPlacement.balanced(experts, size)
    numels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    params = [ParamSpec(f"dense{i}", (n,), None) for i, n in enumerate(numels)]
    params += [ParamSpec(f"expert{e}", (draw(st.integers(1, 30)),), e) for e in range(experts)]
    layout = layout_of_state(params, placement, world, draw(st.booleans()), [("bias", (5,))])
    buddies, gone = buddies_of(["n"] * size), set[int]()
    for rank in draw(st.lists(st.integers(0, size - 1), max_size=3)):
        if buddies[rank] not in gone and all(buddies[other] != rank for other in gone) and len(gone) < size - 1:
            gone.add(rank)
    holders = [world.members[buddies[rank] if rank in gone else rank] for rank in range(size)]
    survivors = tuple(w for rank, w in enumerate(world.members) if rank not in gone)
    return layout, placement, holders, survivors


@given(_lost())
def test_survivors_have_all_that_any_new_world_needs(
    lost: tuple[StateLayout, ExpertPlacement, list[str], tuple[str, ...]],
) -> None:
    layout, placement, holders, survivors = lost
    point = layout_at_recovery_point(layout, holders)
    assert set(point.world.members) == set(survivors)
    new_world = World(1, survivors)
    before = placement_at_recovery_point(placement, holders)
    again = ExpertPlacement.rebalanced(before, world_of(0, holders), new_world)
    new = training_layout(layout.tensors, again, new_world, CommunicationSpec())
    plan = TransferPlan.between(point, new)
    held = {worker: _really_held(layout, holders, worker) for worker in survivors}
    for tensor, start, stop, source, _ in plan.moves.tolist():
        assert any(
            name == plan.names[tensor] and low <= start and stop <= high
            for name, low, high in held[plan.workers[source]]
        ), f"{plan.workers[source]} does not hold {plan.names[tensor]}[{start}:{stop}]"


def _really_held(layout: StateLayout, holders: list[str], worker: str) -> list[tuple[str, int, int]]:
    """What lies in a worker's memory: its own shard, and the shared part of others' snapshots."""
    found = []
    for rank, holder in enumerate(holders):
        if holder == worker:
            form = SnapshotFormat.of(layout, rank)
            count = len(form.names) if layout.world.members[rank] == worker else form.num_shared
            rows = zip(form.names[:count], form.start.tolist(), form.stop.tolist(), strict=False)
            found += [(name, start, stop) for name, start, stop in rows]
    return found


@given(_lost())
def test_a_snapshot_has_all_of_a_shard_and_shares_what_no_other_rank_has(
    lost: tuple[StateLayout, ExpertPlacement, list[str], tuple[str, ...]],
) -> None:
    layout = lost[0]
    for rank, worker in enumerate(layout.world.members):
        form = SnapshotFormat.of(layout, rank)
        rows = sorted(zip(form.names, form.start.tolist(), form.stop.tolist(), strict=True))
        wanted = sorted((layout.names[t], start, stop) for t, start, stop in layout.ranges_of(worker).tolist())
        assert rows == wanted
        ends = form.offset + (form.stop - form.start) * np.array([ITEM_BYTES[dtype] for dtype in form.dtypes])
        assert (form.offset % ALIGNMENT == 0).all() and (ends[:-1] <= form.offset[1:]).all()
        assert form.shared_bytes <= form.total_bytes and (ends[: form.num_shared] <= form.shared_bytes).all()
        for name in form.names[form.num_shared :]:
            tensor = layout.names.index(name)
            assert layout.sharing[tensor] == Sharing.REPLICATED
            assert len(layout.holder_sets[layout.holder_set[tensor]]) == layout.world.size


def test_holders_of_only_others_shards_are_refused() -> None:
    layout = layout_of_state(
        [ParamSpec("w", (4,), None)], ExpertPlacement.balanced(1, 2), World(0, ("a", "b")), False, []
    )
    assert np.array_equal(layout_at_recovery_point(layout, ["a", "a"]).bytes_per_rank(), [4 * 4 + 2 * 4 * 4])
    with pytest.raises(ValueError, match="hold only others' shards"):
        layout_at_recovery_point(layout, ["b", "a"])
