"""Where a shard waits at a fence."""

import pytest
import torch

from orchestrator.state.ranges import NamedRanges
from orchestrator.worker.transition.parking import parked
from tests.support import devices

pytestmark = pytest.mark.usefixtures("device")


def _ranges() -> NamedRanges:
    ranges = NamedRanges()
    for name, start, dtype in (("param/a", 3, torch.bfloat16), ("param/a", 40, torch.bfloat16), ("exp_avg/b", 0, None)):
        ranges.add(name, start, torch.arange(10.0, device=devices.device()).to(dtype or torch.float32) + start)
    return ranges


@pytest.mark.emulated
def test_a_shard_stays_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_GPU_FREE_BYTES", "1000")
    ranges = _ranges()
    assert parked(ranges, 1000) is ranges


@pytest.mark.emulated
def test_a_shard_without_room_for_another_waits_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_GPU_FREE_BYTES", "1000")
    ranges = _ranges()
    copy = parked(ranges, 1001)
    assert [(n, r.start, r.data.dtype) for n, r in copy] == [(n, r.start, r.data.dtype) for n, r in ranges]
    for (_, there), (_, here) in zip(ranges, copy, strict=True):
        assert here.data.is_cpu and here.data.is_pinned() and torch.equal(here.data, there.data.cpu())
