"""Device of a worker."""

import pytest
import torch

from orchestrator.errors import UsageError
from orchestrator.worker.runtime.device import device_of
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
