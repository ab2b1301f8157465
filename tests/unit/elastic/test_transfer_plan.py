"""Transfer plans: executed on numpy arrays, and their bytes against brute force over element sets."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import ParamSpec, Sharing
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from tests.support.layouts import PLAIN, layout_of_state, state_of
from tests.unit.elastic.layouts import elements, execute, fill, pairs, whole


@settings(deadline=None)
@given(pairs)
def test_executing_a_plan_gives_the_new_layout(pair: tuple[StateLayout, StateLayout]) -> None:
    old, new = pair
    before = fill(old)
    after = execute(TransferPlan.between(old, new), before, old.numel)

    held = {
        (t, i, w) for w, mine in after.items() for t, v in mine.items() for i in np.flatnonzero(~np.isnan(v)).tolist()
    }
    assert held == elements(new)
    line = np.append(0, np.cumsum(old.numel))
    for tensor in range(len(new.names)):
        values = [mine[tensor] for mine in after.values() if tensor in mine]
        if new.sharing[tensor] == Sharing.PARTIAL:
            total = sum(mine[tensor] for mine in before.values() if tensor in mine)
            assert np.array_equal(sum(values), total)
        else:
            expected = line[tensor] + np.arange(old.numel[tensor])
            for value in values:
                assert np.array_equal(value[~np.isnan(value)], expected[~np.isnan(value)])


@settings(deadline=None)
@given(pairs)
def test_every_new_holder_gets_each_element_once_and_from_a_holder(pair: tuple[StateLayout, StateLayout]) -> None:
    old, new = pair
    plan = TransferPlan.between(old, new)
    held = elements(old)
    origins: Counter[tuple[int, int, str]] = Counter()
    for rows in (plan.keeps, plan.zeros):
        origins.update((t, i, plan.workers[w]) for t, a, b, w in rows.tolist() for i in range(a, b))
    for tensor, start, stop, source, destination in plan.moves.tolist():
        assert source != destination
        for i in range(start, stop):
            assert (tensor, i, plan.workers[source]) in held
            if plan.accumulates[tensor]:  # an addition, not an origin; a leaving worker's values go out once
                origins[tensor, i, f"out of {source}"] += 1
            else:
                origins[tensor, i, plan.workers[destination]] += 1
    assert set(origins.values()) <= {1}
    assert {key for key in origins if not key[2].startswith("out of")} == elements(new)
    assert {(t, i, plan.workers[w]) for t, a, b, w in plan.keeps.tolist() for i in range(a, b)} == held & elements(new)


@settings(deadline=None)
@given(pairs)
def test_moved_bytes_are_the_minimum(pair: tuple[StateLayout, StateLayout]) -> None:
    old, new = pair
    held, needed = elements(old), elements(new)
    minimum_bytes = 0
    for tensor, _, _ in needed - held:  # a rank that lacks an element must receive it
        minimum_bytes += 0 if old.sharing[tensor] == Sharing.PARTIAL else int(old.itemsize[tensor])
    for tensor, _, _ in held - needed:  # a rank that drops its part of a sum must send it
        minimum_bytes += int(old.itemsize[tensor]) if old.sharing[tensor] == Sharing.PARTIAL else 0
    assert TransferPlan.between(old, new).moved_bytes == minimum_bytes


@settings(deadline=None)
@given(pairs)
def test_every_copy_is_within_one_held_range_at_both_ends_and_neighbours_are_merged(
    pair: tuple[StateLayout, StateLayout],
) -> None:
    old, new = pair
    plan = TransferPlan.between(old, new)
    ranges = {(side, w): layout.ranges_of(w).tolist() for side, layout in enumerate(pair) for w in layout.world.members}

    def inside(side: int, worker: str, tensor: int, start: int, stop: int) -> bool:
        return any(t == tensor and a <= start and stop <= b for t, a, b in ranges[side, worker])

    for tensor, start, stop, source, destination in plan.moves.tolist():
        assert inside(0, plan.workers[source], tensor, start, stop)
        assert inside(1, plan.workers[destination], tensor, start, stop)
    for tensor, start, stop, worker in plan.keeps.tolist():
        assert inside(0, plan.workers[worker], tensor, start, stop)
        assert inside(1, plan.workers[worker], tensor, start, stop)
    ends = {(t, stop, s, d) for t, _, stop, s, d in plan.moves.tolist()}
    assert not ends & {(t, start, s, d) for t, start, _, s, d in plan.moves.tolist()}


@pytest.mark.parametrize(
    ("num_old", "num_joining"),
    [pytest.param(7, 1, id="many_to_one"), pytest.param(3, 2, id="three_to_two"), pytest.param(2, 9, id="two_to_nine")],
)
def test_holders_of_a_replicated_tensor_share_the_load(num_old: int, num_joining: int) -> None:
    olds = tuple(f"o{i}" for i in range(num_old))
    old, new = World(0, olds), World(1, olds + tuple(f"n{i}" for i in range(num_joining)))
    kinds, numel = [Sharing.REPLICATED] * 4, [1000, 1, 70, 333]
    plan = TransferPlan.between(
        whole(kinds, numel, old, [tuple(range(old.size))] * 4), whole(kinds, numel, new, [tuple(range(new.size))] * 4)
    )
    sent_bytes = Counter[int]()
    for tensor, start, stop, source, _ in plan.moves.tolist():
        sent_bytes[source] += (stop - start) * int(plan.itemsize[tensor])
    assert len(sent_bytes) == num_old
    assert max(sent_bytes.values()) - min(sent_bytes.values()) <= 2 * 4
    for nth in range(num_joining):
        assert len(plan.for_worker(f"n{nth}").receives) <= -(-num_old // num_joining) + 1


def test_layouts_of_different_tensors_are_refused() -> None:
    world = World(0, ("a",))
    one = whole([Sharing.REPLICATED], [3], world, [(0,)])
    with pytest.raises(ValueError, match="same tensors"):
        TransferPlan.between(one, whole([Sharing.REPLICATED] * 2, [3, 3], world, [(0,), (0,)]))
    with pytest.raises(ValueError, match="numel of t0"):
        TransferPlan.between(one, whole([Sharing.REPLICATED], [4], world, [(0,)]))
    with pytest.raises(ValueError):
        TransferPlan.between(one, one).for_worker("stranger")


def test_a_partial_tensor_goes_to_survivors_and_newcomers_start_from_zero() -> None:
    old, new = World(0, ("a", "b", "c", "d")), World(1, ("e", "d", "c"))
    plan = TransferPlan.between(
        whole([Sharing.PARTIAL], [5], old, [(0, 1, 2, 3)]), whole([Sharing.PARTIAL], [5], new, [(0, 1, 2)])
    )
    heirs = {plan.workers[s]: plan.workers[d] for *_, s, d in plan.moves.tolist()}
    assert heirs == {"a": "d", "b": "c"}
    assert plan.accumulates == (True,)
    assert plan.for_worker("e").zeros.tolist() == [[0, 0, 5]]
    assert plan.for_worker("c").keeps.tolist() == [[0, 0, 5]]


def test_a_worker_s_rows_are_sorted_and_the_same_at_both_ends() -> None:
    params = [ParamSpec(f"p{i}", (10 + i,), None) for i in range(6)]
    old, new = World(0, ("a", "b", "c")), World(1, ("d", "c", "b", "e", "f"))
    plan = TransferPlan.between(
        layout_of_state(params, ExpertPlacement.balanced(1, 3), old, True, []),
        layout_of_state(params, ExpertPlacement.balanced(1, 5), new, True, []),
    )
    parts = {worker: plan.for_worker(worker) for worker in plan.workers}
    num_rows = 0
    for worker, part in parts.items():
        for source, rows in part.receives.items():
            assert rows.tolist() == parts[source].sends[worker].tolist() == sorted(rows.tolist())
            num_rows += len(rows)
        assert list(part.sends) == sorted(part.sends, key=plan.workers.index)
    assert num_rows == len(plan.moves)


def test_nothing_moves_when_nothing_changes() -> None:
    world = World(0, ("a", "b", "c"))
    params = [ParamSpec("w", (100,), None), ParamSpec("e0", (9,), 0), ParamSpec("e1", (9,), 1)]
    layout = layout_of_state(params, ExpertPlacement.balanced(2, 3), world, True, [("bias", (4,))])
    plan = TransferPlan.between(layout, layout)
    assert (plan.moved_bytes, len(plan.moves), len(plan.zeros)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("first", "last"),
    [pytest.param(0, 1000, id="1024_to_1000"), pytest.param(1024, 2048, id="all_replaced")],
)
def test_a_thousand_ranks_are_planned_in_two_seconds(first: int, last: int) -> None:
    """64 experts x 60 layers x 3 weights, 1,024 ranks: layouts, placement, plan and one worker's part, in CPU seconds.

    Seen: 0.25 s to 1,000 of them, 0.7 s to 1,024 others (963,000 moves).
    """
    params = []
    for layer in range(60):
        params += [ParamSpec(f"{layer}.dense.{i}", (1_000_003 if i < 6 else 1024,), None) for i in range(10)]
        params += [ParamSpec(f"{layer}.{e}.{i}", (500_001,), e) for e in range(64) for i in range(3)]
    buffers = [(f"{layer}.{what}", (64,)) for layer in range(60) for what in ("bias", "load")]
    workers = tuple(f"w{i}" for i in range(2048))
    old, new = World(0, workers[:1024]), World(1, workers[first:last])
    tensors = state_of(params, True, buffers)  # a worker lists them once

    start_s = time.process_time()
    before = ExpertPlacement.balanced(64, old.size)
    after = ExpertPlacement.rebalanced(before, old, new)
    plan = TransferPlan.between(
        training_layout(tensors, before, old, PLAIN), training_layout(tensors, after, new, PLAIN)
    )
    plan.for_worker(new.members[-1])
    assert time.process_time() - start_s < 10.0  # a plan that takes time by the element would take hours
    assert plan.moved_bytes > 0
