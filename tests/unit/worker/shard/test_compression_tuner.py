"""`compression: auto` on one rank: what it makes of what it sees."""

from typing import Any

import pytest
import torch

from orchestrator.policy.estimate.compression_choice import CANDIDATES
from orchestrator.spec.communication import CompressionSpec
from orchestrator.worker.shard.compression_tuner import PROBES, SKIPPED, CompressionTuner, coding_s
from tests.support import devices

AUTO = CompressionSpec(scheme="auto")


class Gradients:
    """Those of a step whose sums take as long as a test says."""

    num_compressed, num_buckets, device, is_timed = 1_000_000, 4, torch.device("cpu"), False
    backward_s, after_backward_s = 0.1, 0.0

    def __init__(self, after_backward_s: float) -> None:
        self.after_backward_s = after_backward_s
        self.used: list[tuple[str, bool]] = []

    def use(self, scheme: str, overlap: bool) -> None:
        self.used.append((scheme, overlap))


def _choosing(gradients: Any, compression: CompressionSpec = AUTO, world_size: int = 2) -> CompressionTuner:
    return CompressionTuner(gradients, compression, True, world_size)


@pytest.mark.parametrize(("seconds", "scheme"), [(0.001, "none"), (20.0, "int4")])
def test_a_slow_link_is_seen_and_answered(seconds: float, scheme: str) -> None:
    gradients = Gradients(seconds)
    choosing = _choosing(gradients)
    assert gradients.used == [("none", False)]  # the link is measured while nothing is computed
    for _ in range(SKIPPED + PROBES):
        assert choosing.proposal == -1
        choosing.observe(0.3, 4_000_000)
    assert CANDIDATES[choosing.proposal] == scheme and gradients.is_timed
    choosing.agree(-1)  # another rank doesn't know yet
    assert choosing.scheme == "none" and len(gradients.used) == 1
    choosing.agree(3)  # another rank would have a coarser one
    assert (choosing.scheme, gradients.used[-1], choosing.proposal) == ("int4", ("int4", True), -1)
    assert not gradients.is_timed  # the host waits for a GPU no longer


@pytest.mark.parametrize(("compression", "world_size"), [(AUTO, 1), (CompressionSpec(scheme="int8"), 2)])
def test_where_there_is_nothing_to_choose_nothing_is_touched(compression: CompressionSpec, world_size: int) -> None:
    gradients = Gradients(1.0)
    choosing = _choosing(gradients, compression, world_size)
    for _ in range(SKIPPED + PROBES + 1):
        choosing.observe(0.3, 4_000_000)
    assert choosing.proposal == -1 and gradients.used == []
    assert choosing.scheme == ("none" if world_size == 1 else "int8")


@pytest.mark.usefixtures("device")
def test_coding_is_timed_once_on_the_device_that_trains() -> None:
    assert 0 < coding_s("int4", devices.device()) == coding_s("int4", devices.device()) < 1e-5
