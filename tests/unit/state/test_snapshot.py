"""Snapshots in memory: what is whole stays whole while the next one is written, and nothing else is held."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.state_spec import Origin, ParamSpec, Sharing, StateTensor
from orchestrator.elastic.world import World
from orchestrator.state.buffers import PIECE, Buffers
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update, copy_into, merge_ranges
from orchestrator.state.snapshot_store import RankSnapshots, SnapshotStore
from tests.support import devices
from tests.support.layouts import layout_of_state

pytestmark = pytest.mark.usefixtures("device")

PARAMS = [ParamSpec("dense", (40,), None), ParamSpec("expert0", (6,), 0), ParamSpec("expert1", (6,), 1)]
LAYOUT = layout_of_state(PARAMS, ExpertPlacement.balanced(2, 2), World(4, ("a", "b")), True, [("bias", (3,))])
EVERY = 4
UPDATE = Update(1, 0.1)


def _held(rank: int, value: float) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in LAYOUT.ranges_of(LAYOUT.world.members[rank]).tolist():
        dtype = getattr(torch, LAYOUT.tensors[LAYOUT.names[tensor]].dtype)
        ranges.add(
            LAYOUT.names[tensor], start, torch.full((stop - start,), value, dtype=dtype, device=devices.device())
        )
    return ranges


def _shard(rank: int, value: float) -> NamedRanges:
    """With gradients of 1."""
    ranges = _held(rank, value)
    for name, (start, stop) in LAYOUT.updates_of(rank).items():
        ranges.add(f"grad/{name}", start, torch.ones(stop - start, device=devices.device()))
    return ranges


def _add_gradients(state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
    """An optimizer that adds: after step n every value is n."""
    for delta in deltas:
        for name, held in delta.ranges:
            if name.startswith("grad/"):
                for kind in ("master", "exp_avg", "exp_avg_sq", "param"):
                    if f"{kind}{name[4:]}" in state.names():
                        state.view(f"{kind}{name[4:]}", held.start, held.stop).add_(held.data)
    for name, held in deltas[-1].ranges:
        if name in state.names():
            state.view(name, held.start, held.stop).copy_(held.data)


def _snapshots(
    rank: int, shared_only: bool, whole_every: int = 1, buffers: Buffers | None = None, generation: int = 4
) -> RankSnapshots:
    return RankSnapshots(generation, rank, LAYOUT, shared_only, whole_every, _add_gradients, buffers=buffers)


def _put(snapshots: RankSnapshots, step: int, update: Update | None = None) -> None:
    snapshot = snapshots.begin(step, str(step), update)
    copy_into(snapshot, _shard(snapshots.rank, float(step)))
    snapshots.finish(snapshot)


def _is_of(snapshots: RankSnapshots, step: int) -> bool:
    held = snapshots.state(step)
    is_noted = held.note == str(step) and held.holding == Holding(4, step, snapshots.rank) and held.update is None
    return is_noted and all(bool((place.data == step).all()) for _, place in held.ranges)


def test_what_a_rank_holds_is_copied_and_its_shared_part_serves_its_buddy() -> None:
    own, kept = _snapshots(0, shared_only=False), _snapshots(0, shared_only=True)
    snapshot = own.begin(7, "note")
    copy_into(snapshot, _shard(0, 2.5))
    own.finish(snapshot)
    arrived = kept.begin(7, "note")
    kept.shared(arrived)[:] = own.shared(snapshot)
    kept.finish(arrived)
    names = set(arrived.ranges.names())
    assert names == {n for n in snapshot.ranges.names() if n not in ("param/dense", "buffer/bias")}
    assert all(bool((held.data == 2.5).all()) for _, held in snapshot.ranges)
    assert all(bool((held.data == 2.5).all()) for _, held in arrived.ranges)


def test_the_newest_whole_one_outlives_the_one_being_written() -> None:
    snapshots, store = _snapshots(0, shared_only=False), SnapshotStore()
    store.add(snapshots)
    for step in range(4):
        snapshot = snapshots.begin(step, str(step))
        copy_into(snapshot, _shard(0, float(step)))
        if step:
            assert Holding(4, step - 1, 0) in store.holdings()
            held = store.find(Holding(4, step - 1, 0))
            assert held.note == str(step - 1) and float(held.ranges.view("exp_avg/dense", 0, 1)) == step - 1
        snapshots.finish(snapshot)
    assert store.holdings() == (Holding(4, 2, 0), Holding(4, 3, 0))
    with pytest.raises(KeyError, match="is not held here"):
        store.find(Holding(4, 1, 0))


def test_one_that_is_given_up_gives_its_memory_back() -> None:
    snapshots = _snapshots(1, shared_only=True, whole_every=EVERY)
    snapshots.finish(snapshots.begin(0, ""))
    for _ in range(3):
        snapshots.give_up(snapshots.begin(1, ""))
    for _ in range(2 * EVERY):
        snapshots.give_up(snapshots.begin(1, "", UPDATE))
    assert snapshots.steps() == (0,)
    _put(snapshots, 1)
    assert snapshots.steps() == (0, 1)


@pytest.mark.parametrize("shared_only", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.booleans(), min_size=1, max_size=14), asked=st.lists(st.integers(0, 1), max_size=3))
def test_the_newest_two_states_can_always_be_had(
    rank: int, shared_only: bool, kinds: list[bool], asked: list[int]
) -> None:
    """Whatever follows what: whole ones where there must be one or a step had no update, deltas elsewhere."""
    snapshots, since = _snapshots(rank, shared_only, EVERY), EVERY
    for step, may_be_delta in enumerate(kinds):
        is_delta = may_be_delta and since < EVERY - 1
        since = since + 1 if is_delta else 0
        _put(snapshots, step, UPDATE if is_delta else None)
        assert snapshots.steps() == tuple(range(max(0, step - 1), step + 1))
    for nth in asked:  # as when a recovery fails and another one goes back elsewhere
        steps = snapshots.steps()
        assert _is_of(snapshots, steps[nth % len(steps)])
        assert len(kinds) - 1 in steps
    for step in snapshots.steps():
        assert _is_of(snapshots, step)


def test_one_that_is_not_asked_for_is_replayed_in_no_ones_place() -> None:
    snapshots = _snapshots(0, False, EVERY)
    for step in range(3):
        _put(snapshots, step, UPDATE if step else None)
    assert _is_of(snapshots, 2) and _is_of(snapshots, 1) and _is_of(snapshots, 2)
    with pytest.raises(KeyError, match="step 0 of rank 0 is not held here"):
        snapshots.state(0)


def test_a_delta_without_the_state_before_it_is_refused() -> None:
    snapshots = _snapshots(0, False, EVERY)
    with pytest.raises(ValueError, match="doesn't follow"):
        snapshots.begin(1, "", UPDATE)
    _put(snapshots, 0)
    with pytest.raises(ValueError, match="doesn't follow"):
        snapshots.begin(2, "", UPDATE)
    for step in range(1, EVERY):
        _put(snapshots, step, UPDATE)
    with pytest.raises(ValueError, match="doesn't follow"):
        snapshots.begin(EVERY, "", UPDATE)
    assert snapshots.steps() == (EVERY - 2, EVERY - 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_replay_that_fails_loses_no_memory_and_no_other_state(in_place: bool) -> None:
    def fail(state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
        raise MemoryError("no room")

    snapshots = RankSnapshots(4, 0, LAYOUT, False, EVERY, fail)
    for step in range(EVERY + in_place):
        _put(snapshots, step, UPDATE if step % EVERY else None)
    with pytest.raises(MemoryError):
        snapshots.state(EVERY - 1)
    assert (EVERY if in_place else 0) in {base.whole.holding.step for base in snapshots._bases}
    assert len(snapshots._free_whole) + len(snapshots._bases) == 2
    assert len(snapshots._free_deltas) + sum(len(base.deltas) for base in snapshots._bases) == EVERY


def test_memory_is_as_planned_and_never_grows() -> None:
    buffers = Buffers()
    snapshots = _snapshots(0, False, EVERY, buffers)
    assert buffers.made_bytes == 0  # nothing before it is needed
    made = []
    for step in range(20):
        snapshots.finish(snapshots.begin(step, "", UPDATE if step % EVERY else None))
        snapshots.state(step)
        made.append(buffers.made_bytes)
    assert 0 < made[0] < made[EVERY] == made[-1] <= (2 + EVERY) * PIECE  # at most a piece each


def test_buffers_freed_by_one_rank_snapshots_serve_the_next_and_the_newest_state_stays() -> None:
    buffers, store = Buffers(), SnapshotStore()
    old = store.add(_snapshots(0, False, EVERY, buffers))
    for step in range(2 * EVERY):
        snapshot = old.begin(step, "", UPDATE if step % EVERY else None)
        for _, held in snapshot.ranges:
            held.data.fill_(step)
        old.finish(snapshot)
    made, newest = buffers.made_bytes, old.steps()[-1]
    held = {id(snapshot.buffer) for base in old._bases for snapshot in (base.whole, *base.deltas)}
    del snapshot
    store.leave_free()
    assert old.steps()[-1] == newest and len(held) >= 2
    new = store.add(_snapshots(0, False, EVERY, buffers, generation=5))
    new.finish(new.begin(2 * EVERY, ""))
    assert buffers.made_bytes == made
    assert all(bool((r.data == EVERY).all()) for _, r in old._bases[-1].whole.ranges)
    store.drop_before(5)
    del old
    for step in range(2 * EVERY + 1, 4 * EVERY):
        new.finish(new.begin(step, "", UPDATE if step % EVERY else None))
    assert buffers.made_bytes == made


def test_older_generations_go() -> None:
    store = SnapshotStore()
    snapshots = store.add(_snapshots(0, shared_only=False))
    snapshots.finish(snapshots.begin(1, ""))
    assert store.num_bytes() == snapshots.num_bytes()
    store.drop_before(4)
    assert store.holdings() == (Holding(4, 1, 0),)
    store.drop_before(5)
    assert store.holdings() == () and store.num_bytes() == 0


def test_parts_of_a_sum_are_added_up() -> None:
    parts = [NamedRanges(), NamedRanges()]
    for number, part in enumerate(parts, 1):
        part.add("residual/dense", 0, torch.full((40,), float(number)))
    residual = StateTensor("residual/dense", (40,), Sharing.PARTIAL, Origin.COPY)
    both = merge_ranges(parts, {residual.name: residual})
    assert both.spans("residual/dense") == [(0, 40)] and both.view("residual/dense", 0, 40).tolist() == [3.0] * 40
    assert parts[0].view("residual/dense", 0, 1).tolist() == [1.0]


def test_shards_are_joined_and_the_first_one_counts_twice_held() -> None:
    both = merge_ranges([_held(0, 1.0), _held(1, 2.0)], LAYOUT.tensors)
    assert len(both.spans("exp_avg/dense")) == 2
    assert both.spans("param/dense") == [(0, 40)] and float(both.view("param/dense", 0, 1)) == 1.0
    assert float(both.view("param/expert1", 0, 1)) == 2.0
