"""`torch.cuda` of the emulated device: its answers to programs, its events and its stream."""

import os
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.emulated_accelerator.operations import settle
from tests.support.emulated_accelerator.rules import generator
from tests.support.emulated_accelerator.tensor import SHOWN, is_emulated

GIB = 1 << 30
FREE_BYTES = "EMULATED_GPU_FREE_BYTES"  # variable of the environment: free memory, all of it if unset


class Event:
    """An event that has always happened, since nothing is asynchronous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...

    synchronize = staticmethod(settle)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class Stream:
    """The only stream, under any name."""

    cuda_stream, stream_id, device_index, priority = 0, 0, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...

    synchronize = staticmethod(settle)

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    @property
    def device(self) -> torch.device:
        return SHOWN


def patch_cuda() -> None:
    """Give `torch.cuda` answers for one GPU."""
    properties = SimpleNamespace(
        name="emulated GPU", total_memory=80 * GIB, uuid="emulated", major=9, minor=0, multi_processor_count=1
    )
    stream = Stream()

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    answers: dict[str, Any] = {
        "_lazy_init": nothing,
        "init": nothing,
        "_lazy_call": lambda callback, **kwargs: callback(),
        "_is_in_bad_fork": lambda: False,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": lambda device: is_emulated(torch.device("cuda", device) if isinstance(device, int) else device),
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "synchronize": settle,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": nothing,
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "default_generators": (generator,),
        "mem_get_info": lambda device=None: (
            int(os.environ.get(FREE_BYTES, properties.total_memory)),
            properties.total_memory,
        ),
        "memory_stats": lambda device=None: Counter(),
        "nccl": SimpleNamespace(version=lambda: (2, 0, 0)),
        "nvtx": SimpleNamespace(range_push=zero, range_pop=zero, mark=nothing),
    }
    for name in ("empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached"):
        answers[name] = nothing
    for name in ("allocated", "reserved", "cached"):
        answers[f"memory_{name}"] = answers[f"max_memory_{name}"] = zero
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
