"""Snapshots in memory: what is whole stays whole while the next one is written, and nothing else is held."""

import pytest
import torch

from orchestrator.elastic.cut import Holding
from orchestrator.elastic.layout import ParamSpec, training_layout
from orchestrator.elastic.placement import Placement
from orchestrator.elastic.snapshot import SnapshotFormat
from orchestrator.elastic.world import World
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Shelf, Vault, copy_into, joined

PARAMS = [ParamSpec("dense", 10, None), ParamSpec("expert0", 6, 0), ParamSpec("expert1", 6, 1)]
LAYOUT = training_layout(PARAMS, Placement.balanced(2, 2), World(4, ("a", "b")), True, [("bias", 3)])


def _shard(rank: int, value: float) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in LAYOUT.ranges_of(LAYOUT.world.members[rank]).tolist():
        dtype = torch.bfloat16 if LAYOUT.itemsize[tensor] == 2 else torch.float32
        ranges.add(LAYOUT.names[tensor], start, torch.full((stop - start,), value, dtype=dtype))
    return ranges


def _shelf(rank: int, shared_only: bool) -> Shelf:
    return Shelf(4, rank, SnapshotFormat.of(LAYOUT, rank), shared_only)


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
    shelf, vault = _shelf(0, shared_only=False), Vault()
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
    shelf = _shelf(1, shared_only=True)
    shelf.finish(shelf.begin(0, ""))
    for step in (1, 1, 1):
        shelf.give_up(shelf.begin(step, ""))
    assert [s.holding.step for s in shelf.whole] == [0]
    shelf.finish(shelf.begin(2, ""))
    assert [s.holding.step for s in shelf.whole] == [0, 2]


def test_older_generations_go() -> None:
    vault = Vault()
    shelf = vault.add(_shelf(0, shared_only=False))
    shelf.finish(shelf.begin(1, ""))
    assert vault.num_bytes() == 2 * shelf.num_bytes
    vault.drop_before(4)
    assert vault.holdings() == (Holding(4, 1, 0),)
    vault.drop_before(5)
    assert vault.holdings() == () and vault.num_bytes() == 0


def test_shards_are_joined_and_the_first_one_counts_twice_held() -> None:
    both = joined([_shard(0, 1.0), _shard(1, 2.0)])
    assert both.spans("exp_avg/dense") == [(0, 5), (5, 10)] or len(both.spans("exp_avg/dense")) == 2
    assert both.spans("param/dense") == [(0, 10)] and float(both.view("param/dense", 0, 1)) == 1.0
    assert float(both.view("param/expert1", 0, 1)) == 2.0
