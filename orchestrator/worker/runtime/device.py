"""Device that a worker trains on."""

import logging

import torch

from orchestrator.errors import UsageError
from orchestrator.model.linear.float8 import mm
from orchestrator.policy.estimate.worker_memory import MemoryPlan

log = logging.getLogger("orchestrator.worker")

GIB = 1 << 30
SMALLER = "Use more workers, gradient_checkpointing, or a smaller micro-batch."
SHARE = "Set workers.max to more, which share the state, or use larger GPUs."


def device_of(gpus: float) -> torch.device:
    """The CPU, or the GPU of a worker that reserves one. Ray hides all other GPUs from the process, so it is the first
    one whatever its number on the node.

    Args:
        gpus: GPUs reserved.

    Raises:
        UsageError: a GPU is reserved, and torch can't use one.
    """
    if not gpus:
        return torch.device("cpu")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        if torch.cuda.device_count() == 0:
            raise RuntimeError("the driver shows none")
    except (RuntimeError, AssertionError) as error:  # the driver is too old or isn't there; torch has no CUDA
        raise UsageError(
            f"resources.gpus is {gpus:g}, but torch {torch.__version__} can't use a GPU where Ray has put a worker: "
            f"{str(error).splitlines()[0]}",
            remedy="Install a torch build for CUDA and a driver for it on every node with GPUs, or set resources.gpus "
            "to 0.",
        ) from error
    return torch.device("cuda", 0)


def check_float8(device: torch.device) -> None:
    """Try a product in float8.

    Raises:
        UsageError: torch doesn't offer it on this device.
    """
    x_MK = torch.ones(1, 1, device=device)
    try:
        mm(x_MK, x_MK)
    except (RuntimeError, AttributeError) as error:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise UsageError(
            f"train.float8 is true, but torch {torch.__version__} can't multiply in float8 on {where}: "
            f"{str(error).splitlines()[0]}",
            remedy="Set train.float8 to false, or use GPUs of compute capability 8.9 or later and a newer torch.",
        ) from error


def check_gpu_memory(first: MemoryPlan, least: MemoryPlan, device: torch.device) -> None:
    """Compare a worker's plans with the memory of its GPU. Activations are estimates, and the world may be another one
    than the first, so they only make a warning.

    Args:
        first: in the run's first world.
        least: in the largest one, where it needs least.

    Raises:
        UsageError: weights, optimizer state, gradients and a teacher alone exceed it in any world.
    """
    if device.type != "cuda":
        return
    card = torch.cuda.get_device_properties(device)
    needs, has = f"{first.on_gpu / GIB:.1f} GiB", f"{card.name} has {card.total_memory / GIB:.1f} GiB"
    if (state_bytes := least.engine + least.teacher) > card.total_memory:
        teacher = " and a teacher" if least.teacher else ""
        state = (
            f"{state_bytes / GIB:.1f} GiB for weights, optimizer state and gradients{teacher}, also among workers.max"
        )
        raise UsageError(f"a worker needs {state}, and its GPU {has}", remedy=SHARE)
    if first.on_gpu > card.total_memory:
        log.warning("a worker is estimated to need %s, and its GPU %s. %s", needs, has, SMALLER)
