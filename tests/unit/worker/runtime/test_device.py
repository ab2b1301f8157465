"""Device of a worker."""

import pytest
import torch

from orchestrator.errors import UsageError
from orchestrator.policy.estimate.worker_memory import MemoryPlan
from orchestrator.worker.runtime.device import GIB, check_float8, check_gpu_memory, device_of
from tests.support import devices


def test_a_worker_without_gpus_trains_on_the_cpu() -> None:
    assert device_of(0.0) == torch.device("cpu")


@pytest.mark.usefixtures("device")
def test_a_worker_that_reserves_one_trains_on_it_or_learns_why_not() -> None:
    if devices.device().type == "cuda":
        assert device_of(1.0) == device_of(0.6) == torch.device("cuda", 0)
        return
    with pytest.raises(
        UsageError, match="resources.gpus is 1, but torch .* can't use a GPU .*: Torch not compiled"
    ) as no:
        device_of(1.0)
    assert "torch build for CUDA" in no.value.remedy


def test_an_old_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError, match=r"driver on your system is too old \(found version 11040\)"):
        device_of(0.5)


@pytest.mark.usefixtures("device")
def test_float8_is_refused_where_the_gpu_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_float8(devices.device())
    if devices.device().type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        with pytest.raises(UsageError, match="can't multiply in float8 on emulated GPU: .*compute capability") as no:
            check_float8(devices.device())
        assert "Set train.float8 to false" in no.value.remedy


def _plan(state_gib: int, activations_gib: int) -> MemoryPlan:
    state, activations = state_gib * GIB, activations_gib * GIB
    return MemoryPlan(state, 0, 0, 0, kept=0, gradients=0, activations=activations, loss=0, fence=500 * GIB)


@pytest.mark.usefixtures("device")
def test_a_shard_that_no_gpu_of_the_kind_could_hold_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    if devices.device().type == "cpu":  # whose memory admission knows
        check_gpu_memory(_plan(81, 0), _plan(81, 0), devices.device())
        return
    check_gpu_memory(_plan(70, 9), _plan(60, 9), devices.device())
    assert caplog.text == ""
    check_gpu_memory(_plan(70, 11), _plan(60, 11), devices.device())
    assert "a worker is estimated to need 81.0 GiB, and its GPU emulated GPU has 80.0 GiB" in caplog.text
    with pytest.raises(UsageError, match="needs 81.0 GiB for weights, .* and its GPU emulated GPU has 80.0 GiB") as no:
        check_gpu_memory(_plan(90, 0), _plan(81, 0), devices.device())
    check_gpu_memory(_plan(90, 0), _plan(79, 0), devices.device())  # a larger world fits
    assert "workers.max" in no.value.remedy
