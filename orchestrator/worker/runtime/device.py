"""Device that a worker trains on."""

import torch

from orchestrator.errors import UsageError


def device_of(gpus: float, num_visible: int) -> torch.device:
    """The CPU, or the GPU of a worker that reserves one. Ray hides all other GPUs from the process, so it is the first
    one whatever its number on the node.

    Args:
        gpus: GPUs reserved.
        num_visible: GPUs that torch sees.

    Raises:
        UsageError: a GPU is reserved, and torch sees none.
    """
    if not gpus:
        return torch.device("cpu")
    if num_visible == 0:
        raise UsageError(
            f"resources.gpus is {gpus:g}, but torch {torch.__version__} sees no GPU where Ray has put a worker",
            remedy="Install a torch build for CUDA and the driver on every node with GPUs, or set resources.gpus to 0.",
        )
    return torch.device("cuda", 0)
