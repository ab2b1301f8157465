"""Time on a device that computes beside the host."""

import time

import torch


def finished_s(device: torch.device) -> float:
    """`time.perf_counter` once the device has finished all work that this process has given it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
