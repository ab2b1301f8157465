import pytest
import torch

from orchestrator.errors import UsageError
from orchestrator.worker.runtime.device import device_of


@pytest.mark.parametrize("num_visible", [0, 1, 8])
def test_who_reserves_no_gpu_takes_none(num_visible: int) -> None:
    assert device_of(0, num_visible) == torch.device("cpu")


@pytest.mark.parametrize("gpus", [0.75, 1.0])
def test_who_reserves_one_takes_the_first_that_it_is_shown(gpus: float) -> None:
    assert device_of(gpus, 1) == torch.device("cuda:0")


def test_nobody_trains_on_processors_while_a_gpu_is_reserved() -> None:
    with pytest.raises(UsageError, match=r"resources\.gpus is 1, but torch .* sees no GPU"):
        device_of(1, 0)
