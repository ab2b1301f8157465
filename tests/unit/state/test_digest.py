"""Digests don't depend on how a tensor is cut, and a changed bit changes them."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.state.digest import (
    _TABLE,
    PERIOD,
    WORD,
    StateDigests,
    _block_key,
    differing,
    digest,
    digest_on_device,
)
from orchestrator.state.ranges import NamedRanges
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")

WRAP = 1 << 64
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8]


def _values(numel: int, dtype: torch.dtype) -> Tensor:
    """Random bits, whatever they mean in `dtype`."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(numel)
    return (
        torch.randint(0, 256, (numel * itemsize,), dtype=torch.uint8, generator=generator)
        .to(devices.device())
        .view(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_digest_is_the_sum_of_its_formula(dtype: torch.dtype) -> None:
    data = _values(41, dtype)
    itemsize = data.element_size()
    start = PERIOD * WORD // itemsize - 3  # in the middle of a word, and across the end of a block
    total = 0
    for at, byte in enumerate(data.view(torch.uint8).tolist(), start=start * itemsize):
        block, offset = divmod(at // WORD, PERIOD)
        total += (byte << 8 * (at % WORD)) * int(_TABLE[offset]) * _block_key(block)
    assert digest(start, data) == total % WRAP


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.lists(st.integers(0, 2 * PERIOD + 99), max_size=5), st.integers(0, 3 * PERIOD))
@settings(max_examples=15)
def test_digests_of_the_parts_add_up_however_it_is_cut(dtype: torch.dtype, cuts: list[int], start: int) -> None:
    data = _values(2 * PERIOD + 99, dtype)
    borders = sorted([0, *cuts, len(data)])
    parts = [digest(start + a, data[a:b]) for a, b in pairwise(borders)]
    assert sum(reversed(parts)) % WRAP == digest(start, data)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1, 3, PERIOD * WORD - 5])
@pytest.mark.parametrize("portion", [1, 1 << 9], ids=["a block at once", "many at once"])
def test_a_device_computes_the_digest_of_the_host(
    dtype: torch.dtype, start: int, portion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.state.digest.BLOCKS_AT_ONCE", portion)
    data = _values(3 * PERIOD + 7, dtype)
    assert int(digest_on_device(start, data)) % WRAP == digest(start, data.cpu())


@given(st.sampled_from(DTYPES), st.integers(0, PERIOD + 49), st.data())
@settings(max_examples=60)
def test_any_flipped_bit_is_found(dtype: torch.dtype, element: int, data: st.DataObject) -> None:
    values = _values(PERIOD + 50, dtype)
    before = digest(7, values)
    bit = data.draw(st.integers(0, 8 * values.element_size() - 1))
    values.view(torch.uint8)[element * values.element_size() + bit // 8] ^= 1 << bit % 8
    assert digest(7, values) != before


def test_order_and_place_count() -> None:
    data = torch.arange(8, dtype=torch.float32, device=devices.device())
    assert digest(0, data) != digest(0, data.flip(0))
    assert digest(0, data) != digest(1, data)
    assert digest(0, data) != digest(PERIOD, data)


def test_zeros_of_either_sign_and_nans_have_different_digests() -> None:
    device = devices.device()
    assert digest(0, torch.tensor([0.0], device=device)) != digest(0, torch.tensor([-0.0], device=device))
    assert digest(0, torch.tensor([float("nan")])) == digest(0, torch.tensor([float("nan")], device=device))


def test_nothing_has_a_digest_of_zero() -> None:
    assert digest(5, torch.empty(0, device=devices.device())) == 0


def _ranges(**pieces: list[tuple[int, Tensor]]) -> NamedRanges:
    ranges = NamedRanges()
    for name, held in pieces.items():
        for start, data in held:
            ranges.add(name, start, data)
    return ranges


def _differing(before: NamedRanges, after: NamedRanges) -> list[str]:
    names, replicated = ["whole", "cut"], frozenset({"whole"})
    alone = PeerGroup(HashStore(), "test", ("w0",), "w0")
    return differing(names, StateDigests(names, replicated, before), StateDigests(names, replicated, after), alone)


def test_states_that_are_cut_in_another_way_are_equal_and_changed_ones_are_named() -> None:
    whole, cut = torch.randn(40, device=devices.device()), torch.randn(30, device=devices.device()).bfloat16()
    before = _ranges(whole=[(0, whole)], cut=[(0, cut)])
    after = _ranges(whole=[(0, whole.clone())], cut=[(0, cut[:11].clone()), (11, cut[11:].clone())])
    assert _differing(before, after) == []
    after.view("cut", 12, 13).view(torch.int16)[0] ^= 1
    assert _differing(before, after) == ["cut"]
    after.view("whole", 0, 1).add_(1)
    assert _differing(before, after) == ["whole", "cut"]


def test_a_tensor_that_got_lost_is_named() -> None:
    whole, cut = torch.randn(2, 4, device=devices.device())
    assert _differing(_ranges(whole=[(0, whole)], cut=[(0, cut)]), _ranges(cut=[(0, cut)])) == ["whole"]
    assert _differing(_ranges(whole=[(0, whole)], cut=[(0, cut)]), _ranges(whole=[(0, whole)])) == ["cut"]
