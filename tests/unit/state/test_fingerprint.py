"""Digests per rank: equal in every world, and different for any flipped bit."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import ParamSpec, Sharing
from orchestrator.elastic.world import World
from orchestrator.state.fingerprint import MODULUS, MemoryGuard, StateFingerprint, whole
from orchestrator.state.ranges import NamedRanges
from tests.support import devices
from tests.support.layouts import layout_of_state

pytestmark = pytest.mark.usefixtures("device")

DTYPES = {2: torch.bfloat16, 4: torch.float32}
PARAMS = [
    ParamSpec("head", (101,), None),
    ParamSpec("bias", (3,), None),
    *(ParamSpec(f"expert.{e}", (37 + e,), e) for e in range(3)),
]


def _layout(size: int, mixed: bool) -> StateLayout:
    world = World(0, tuple(f"w{rank}" for rank in range(size)))
    return layout_of_state(PARAMS, ExpertPlacement.balanced(3, size), world, mixed, [("counts", (5,))])


def _values(layout: StateLayout) -> dict[str, Tensor]:
    """The whole state; a parameter's master is not its parameter."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(int(numel), generator=generator).to(devices.device(), DTYPES[int(itemsize)])
        for name, numel, itemsize in zip(layout.names, layout.numel, layout.itemsize, strict=True)
    }


def _held(layout: StateLayout, values: dict[str, Tensor], rank: int) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in layout.ranges_of(f"w{rank}"):
        name = layout.names[tensor]
        ranges.add(name, int(start), values[name][start:stop].clone())
    return ranges


def _digests(of: StateLayout, by: StateLayout, values: dict[str, Tensor]) -> list[str]:
    """Of the ranks of one world, made by those of another."""
    parts = [StateFingerprint(_held(by, values, rank), of).look() for rank in range(by.world.size)]
    sums = np.stack(parts).sum(axis=0, dtype=np.uint64).tolist()
    return [f"{digits:016x}" for digits in sums]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_any_world_can_compute_the_digests_of_any_other(size: int, mixed: bool) -> None:
    layout = _layout(size, mixed)
    values = _values(layout)
    own = _digests(layout, layout, values)
    assert len(set(own)) == size
    for other in (1, 2, 4):
        assert _digests(layout, _layout(other, mixed), values) == own
    assert whole(own) == whole(_digests(_layout(1, mixed), layout, values))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_flipped_bit_changes_the_digest_of_the_rank_that_updates_it_and_no_other(mixed: bool) -> None:
    layout, alone = _layout(3, mixed), _layout(1, mixed)
    values = _values(layout)
    before = _digests(layout, alone, values)
    weights = "master" if mixed else "param"
    for prefix in (weights, "exp_avg", "exp_avg_sq"):
        for index, name in enumerate(layout.names):
            if layout.sharing[index] != Sharing.SHARDED or not name.startswith("exp_avg/"):
                continue
            for _, start, stop, rank in layout.shards[layout.shards[:, 0] == index]:
                tensor = values[f"{prefix}/{name.partition('/')[2]}"]
                for element in (start, stop - 1):
                    tensor.view(torch.int32)[element] ^= 1
                    after = _digests(layout, alone, values)
                    assert [r for r in range(3) if after[r] != before[r]] == [rank]
                    tensor.view(torch.int32)[element] ^= 1


def test_each_rank_digests_only_the_part_that_it_updates() -> None:
    layout = _layout(3, mixed=False)
    values = _values(layout)
    for rank in range(3):
        told = StateFingerprint(_held(layout, values, rank), layout).look()
        assert [r for r in range(3) if told[r]] == [rank]


def test_the_whole_wraps() -> None:
    parts = [f"{MODULUS - 1:016x}", f"{2:016x}"]
    assert whole(parts) == f"{1:016x}" and whole([]) == "0" * 16


def test_a_seal_names_what_was_written_to_while_it_was_closed() -> None:
    ranges = NamedRanges()
    values = {name: torch.arange(9.0, device=devices.device()) for name in ("param/a", "param/b")}
    for name, data in values.items():
        for start, stop in pairwise((0, 4, 9)):
            ranges.add(name, start, data[start:stop])
    seal = MemoryGuard(ranges)
    assert seal.open() == []  # nobody has closed it
    seal.close()
    assert seal.open() == []
    seal.close()
    values["param/b"].view(torch.int32)[5] ^= 1
    assert seal.open() == ["param/b"]
    values["param/a"][0] = 7.0
    assert seal.open() == []  # it is open
