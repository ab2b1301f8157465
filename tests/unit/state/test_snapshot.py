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
from orchestrator.state.buffers import Buffers
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


def _shelf(
    rank: int, shared_only: bool, whole_every: int = 1, buffers: Buffers | None = None, generation: int = 4
) -> RankSnapshots:
    return RankSnapshots(generation, rank, LAYOUT, shared_only, whole_every, _add_gradients, buffers=buffers)


def _put(shelf: RankSnapshots, step: int, update: Update | None = None) -> None:
    snapshot = shelf.begin(step, str(step), update)
    copy_into(snapshot, _shard(shelf.rank, float(step)))
    shelf.finish(snapshot)


def _is_of(shelf: RankSnapshots, step: int) -> bool:
    held = shelf.state(step)
    is_noted = held.note == str(step) and held.holding == Holding(4, step, shelf.rank) and held.update is None
    return is_noted and all(bool((place.data == step).all()) for _, place in held.ranges)


def test_what_a_rank_holds_is_copied_and_its_shared_part_serves_its_buddy() -> None:
    own, kept = _shelf(0, shared_only=False), _shelf(0, shared_only=True)
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
    shelf, vault = _shelf(0, shared_only=False), SnapshotStore()
    vault.add(shelf)
    for step in range(4):
        snapshot = shelf.begin(step, str(step))
        copy_into(snapshot, _shard(0, float(step)))
        if step:
            assert Holding(4, step - 1, 0) in vault.holdings()
            held = vault.find(Holding(4, step - 1, 0))
            assert held.note == str(step - 1) and float(held.ranges.view("exp_avg/dense", 0, 1)) == step - 1
        shelf.finish(snapshot)
    assert vault.holdings() == (Holding(4, 2, 0), Holding(4, 3, 0))
    with pytest.raises(KeyError, match="is not held here"):
        vault.find(Holding(4, 1, 0))


def test_one_that_is_given_up_gives_its_memory_back() -> None:
    shelf = _shelf(1, shared_only=True, whole_every=EVERY)
    shelf.finish(shelf.begin(0, ""))
    for _ in range(3):
        shelf.give_up(shelf.begin(1, ""))
    for _ in range(2 * EVERY):
        shelf.give_up(shelf.begin(1, "", UPDATE))
    assert shelf.steps() == (0,)
    _put(shelf, 1)
    assert shelf.steps() == (0, 1)


@pytest.mark.parametrize("shared_only", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.booleans(), min_size=1, max_size=14), asked=st.lists(st.integers(0, 1), max_size=3))
def test_the_newest_two_states_can_always_be_had(
    rank: int, shared_only: bool, kinds: list[bool], asked: list[int]
) -> None:
    """Whatever follows what: whole ones where there must be one or a step had no update, deltas elsewhere."""
    shelf, since = _shelf(rank, shared_only, EVERY), EVERY
    for step, may_be_delta in enumerate(kinds):
        is_delta = may_be_delta and since < EVERY - 1
        since = since + 1 if is_delta else 0
        _put(shelf, step, UPDATE if is_delta else None)
        assert shelf.steps() == tuple(range(max(0, step - 1), step + 1))
    for nth in asked:  # as when a recovery fails and another one goes back elsewhere
        steps = shelf.steps()
        assert _is_of(shelf, steps[nth % len(steps)])
        assert len(kinds) - 1 in steps
    for step in shelf.steps():
        assert _is_of(shelf, step)


def test_one_that_is_not_asked_for_is_replayed_in_no_ones_place() -> None:
    shelf = _shelf(0, False, EVERY)
    for step in range(3):
        _put(shelf, step, UPDATE if step else None)
    assert _is_of(shelf, 2) and _is_of(shelf, 1) and _is_of(shelf, 2)
    with pytest.raises(KeyError, match="step 0 of rank 0 is not held here"):
        shelf.state(0)


def test_a_delta_without_the_state_before_it_is_refused() -> None:
    shelf = _shelf(0, False, EVERY)
    with pytest.raises(ValueError, match="doesn't follow"):
        shelf.begin(1, "", UPDATE)
    _put(shelf, 0)
    with pytest.raises(ValueError, match="doesn't follow"):
        shelf.begin(2, "", UPDATE)
    for step in range(1, EVERY):
        _put(shelf, step, UPDATE)
    with pytest.raises(ValueError, match="doesn't follow"):
        shelf.begin(EVERY, "", UPDATE)
    assert shelf.steps() == (EVERY - 2, EVERY - 1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_replay_that_fails_loses_no_memory_and_no_other_state(in_place: bool) -> None:
    def fail(state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
        raise MemoryError("no room")

    shelf = RankSnapshots(4, 0, LAYOUT, False, EVERY, fail)
    for step in range(EVERY + in_place):
        _put(shelf, step, UPDATE if step % EVERY else None)
    with pytest.raises(MemoryError):
        shelf.state(EVERY - 1)
    assert (EVERY if in_place else 0) in {base.whole.holding.step for base in shelf._bases}
    assert len(shelf._free_whole) + len(shelf._bases) == 2
    assert len(shelf._free_deltas) + sum(len(base.deltas) for base in shelf._bases) == EVERY


def test_memory_is_what_was_said_and_never_grows() -> None:
    buffers = Buffers()
    shelf = _shelf(0, False, EVERY, buffers)
    assert buffers.made_bytes == 0  # nothing before it is needed
    made = []
    for step in range(20):
        shelf.finish(shelf.begin(step, "", UPDATE if step % EVERY else None))
        shelf.state(step)
        made.append(buffers.made_bytes)
    assert 0 < made[0] < made[EVERY] == made[-1] <= shelf.num_bytes()


def test_what_a_shelf_leaves_free_the_next_one_takes_and_the_newest_state_stays() -> None:
    buffers, vault = Buffers(), SnapshotStore()
    old = vault.add(_shelf(0, False, EVERY, buffers))
    for step in range(2 * EVERY):
        snapshot = old.begin(step, "", UPDATE if step % EVERY else None)
        for _, held in snapshot.ranges:
            held.data.fill_(step)
        old.finish(snapshot)
    made, newest = buffers.made_bytes, old.steps()[-1]
    held = {id(snapshot.buffer) for base in old._bases for snapshot in (base.whole, *base.deltas)}
    del snapshot
    vault.leave_free()
    assert old.steps()[-1] == newest and len(held) >= 2
    new = vault.add(_shelf(0, False, EVERY, buffers, generation=5))
    new.finish(new.begin(2 * EVERY, ""))
    assert buffers.made_bytes == made
    assert all(bool((r.data == EVERY).all()) for _, r in old._bases[-1].whole.ranges)
    vault.drop_before(5)
    del old
    for step in range(2 * EVERY + 1, 4 * EVERY):
        new.finish(new.begin(step, "", UPDATE if step % EVERY else None))
    assert buffers.made_bytes == made


def test_older_generations_go() -> None:
    vault = SnapshotStore()
    shelf = vault.add(_shelf(0, shared_only=False))
    shelf.finish(shelf.begin(1, ""))
    assert vault.num_bytes() == shelf.num_bytes()
    vault.drop_before(4)
    assert vault.holdings() == (Holding(4, 1, 0),)
    vault.drop_before(5)
    assert vault.holdings() == () and vault.num_bytes() == 0


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
