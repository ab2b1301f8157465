"""The pools of ranks for tests of one GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.support import devices
from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == devices.GPU and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU; --device emulated needs none")
    devices.selected = request.param
    return str(request.param)


@pytest.fixture(scope="session")
def ranks(device: str) -> Iterator[Ranks]:
    pool = Ranks(device)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def cpu_ranks() -> Iterator[Ranks]:
    pool = Ranks(devices.CPU)
    yield pool
    pool.close()
