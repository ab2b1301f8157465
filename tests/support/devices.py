"""The device that holds the tensors of a test's process: the processor, an emulated GPU, or a real one.

Tests that run on either use the fixture `device`; `pytest --device emulated`
runs only those, with `emulated` in their ids. A process chooses once, before its first tensor (`use`), and keeps its
device until it ends: pytest's own in unit tests, processes of ranks and workers in integration tests (`selected`).
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU, EMULATED, GPU = "cpu", "emulated", "gpu"
DEVICES = (CPU, EMULATED, GPU)

selected = CPU  # of the processes that a test starts
_used = CPU  # by this process


def use(name: str, plain_attention: bool = False) -> "torch.device":
    """Have tensors on this device from now on.

    Args:
        plain_attention: compute attention on the processor as the emulated GPU does, so that bits can be compared.
    """
    import torch  # not by every test that imports this module

    global _used
    _used = name
    if name == CPU:
        torch.backends.cuda.enable_flash_sdp(not plain_attention)
        return device()
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    os.environ["DS_ACCELERATOR"] = "cuda"
    if name == GPU:
        if not torch.cuda.is_available():
            raise RuntimeError("--device gpu was given, and torch sees no GPU; --device emulated needs none")
    else:
        from tests.support.emulated_accelerator import install

        install()
    set_accelerator(CUDA_Accelerator())
    return device()


def device() -> "torch.device":
    """The device of this process."""
    import torch

    return torch.device("cpu") if _used == CPU else torch.device("cuda", 0)


def backend() -> str:
    """The backend of process groups for that device."""
    return "gloo" if _used == CPU else "nccl"
