"""The emulated GPU: what it refuses, what it allows, and that it computes as the CPU does."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import devices
from tests.support.emulated_accelerator import DeviceError, host_syncs, survey

pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.emulated]


def _ones() -> torch.Tensor:
    return torch.ones(2, 3, device=devices.device())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MISTAKES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a CPU operand": lambda x: x + torch.ones(3),
    "a CPU index_select": lambda x: x.index_select(0, torch.tensor([1])),
    "numpy()": lambda x: x.numpy(),
    "a CPU generator": lambda x: x.normal_(generator=torch.Generator()),
    "pinned device memory": lambda x: torch.empty(3, device=x.device, pin_memory=True),
    "another GPU": lambda x: torch.zeros(3, device="cuda:1"),
    "a CPU sum of device values": lambda x: torch.zeros(()).add_(x.sum()),
    "a CPU moment": lambda x: torch._foreach_add_([x], [torch.ones(2, 3)]),
    "cat of two devices": lambda x: torch.cat([x, torch.ones(2, 3)]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake: str) -> None:
    with pytest.raises((DeviceError, TypeError)):
        MISTAKES[mistake](_ones())


def test_a_product_whose_bits_may_vary_is_refused(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(DeviceError, match="CUBLAS_WORKSPACE_CONFIG"):
        _ones() @ _ones().t()


def test_what_cuda_allows_is_allowed() -> None:
    x = _ones()
    allowed = x * torch.tensor(2.0), x[torch.tensor([1])], x.cpu() + torch.ones(3), x.fill_(torch.tensor(1.0))
    assert [each.sum().item() for each in allowed] == [12.0, 3.0, 12.0, 6.0]


def test_a_copy_before_any_wait_is_garbage() -> None:
    copy = _ones().to("cpu", non_blocking=True)
    assert copy.isnan().all()
    torch.cuda.synchronize()
    assert copy.tolist() == [[1.0] * 3] * 2


def test_a_copy_is_complete_once_its_own_thread_has_waited() -> None:
    values, ended = torch.ones(100_000, device=devices.device()), threading.Event()

    def wait_for_the_device() -> None:
        while not ended.is_set():
            torch.cuda.synchronize()

    other = threading.Thread(target=wait_for_the_device)
    other.start()
    try:
        for _ in range(300):
            copy = values.to("cpu", non_blocking=True)
            torch.cuda.synchronize()
            assert (copy == 1.0).all()
    finally:
        ended.set()
        other.join()


def _losses(device: torch.device) -> list[float]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(20):
        loss = (net(rows) - rows.prod(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_net_has_the_losses_that_it_has_on_the_cpu_and_waits_are_counted() -> None:
    with host_syncs() as places:
        there = _losses(devices.device())
    assert there == _losses(torch.device("cpu")) and there[-1] < there[0]
    assert sum(count for place, count in places.items() if place.endswith(": _local_scalar_dense")) == 20  # item()


def test_copies_to_the_device_wait_unless_they_are_from_pinned_memory() -> None:
    pinned = torch.ones(3, device="cpu", pin_memory=True)
    with host_syncs() as places:
        pinned.to(devices.device(), non_blocking=True)
    assert not places
    with host_syncs() as places:
        torch.ones(3).to(devices.device())
        _ones()[torch.tensor([1])]
        torch.tensor([1.0], device=devices.device())
    assert sum(places.values()) == 3


def test_nccl_sums_on_the_device_and_refuses_the_cpu() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        total = torch.arange(3.0, device=devices.device())
        dist.all_reduce(total)
        assert dist.get_backend() == "nccl" and total.tolist() == [0.0, 1.0, 2.0]
        with pytest.raises(RuntimeError, match="No backend type associated"):
            dist.all_reduce(torch.ones(3))
    finally:
        dist.destroy_process_group()


def test_a_survey_lists_mistakes_and_continues() -> None:
    with survey() as findings:
        (_ones() + torch.ones(3)).numpy()
    assert len(findings) == 2 and all("test_emulated_accelerator.py" in finding.where for finding in findings)
