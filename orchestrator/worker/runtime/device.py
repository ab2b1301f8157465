"""Device that a worker trains on."""

import torch

from orchestrator.errors import UsageError


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
