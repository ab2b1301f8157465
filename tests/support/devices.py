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
sharing = False  # whether these share one GPU, so that gloo connects them
_used = CPU  # by this process
_is_shared = False


def use(name: str, plain_attention: bool = False, is_shared: bool = False) -> "torch.device":
    """Have tensors on this device from now on.

    Args:
        plain_attention: compute attention on the processor as the emulated GPU does, so that bits can be compared.
        is_shared: use a GPU that others use too: ranks are connected by gloo, as nccl refuses two on one.
    """
    import torch  # not by every test that imports this module

    global _used, _is_shared
    _used, _is_shared = name, is_shared
    if is_shared:
        from orchestrator.worker.shard import shard
        from orchestrator.worker.transition import warmup

        shard.backend_of = warmup.backend_of = lambda device: backend()
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
    return "gloo" if _used == CPU or _is_shared else "nccl"
