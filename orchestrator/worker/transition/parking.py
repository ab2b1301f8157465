"""The old shard at a fence on a GPU whose memory has no room for a second one: it waits in host memory.

Where there is room it stays, since moves within a device take no time.
"""

import torch

from orchestrator.state.ranges import NamedRanges


def parked(ranges: NamedRanges, needed_bytes: int) -> NamedRanges:
    """The ranges, or a copy in pinned memory if they are on a GPU where fewer than `needed_bytes` are free."""
    device = next((held.data.device for _, held in ranges), torch.device("cpu"))
    if device.type != "cuda" or _free_bytes(device) >= needed_bytes:
        return ranges
    copy = NamedRanges()
    for name, held in ranges:
        data = torch.empty(len(held.data), dtype=held.data.dtype, device="cpu", pin_memory=True)
        copy.add(name, held.start, data.copy_(held.data, non_blocking=True))
    torch.cuda.synchronize(device)
    return copy


def _free_bytes(device: torch.device) -> int:
    """Free memory, with what torch has taken and doesn't use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
