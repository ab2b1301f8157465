"""Collectives on tensors of the emulated device: gloo plays nccl."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import Queue
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.support.emulated_accelerator.operations import made
from tests.support.emulated_accelerator.refusals import DeviceError, refuse
from tests.support.emulated_accelerator.tensor import SHOWN, Tensor, on_host

NOT_IN_NCCL = {torch.int16, torch.uint16, torch.uint32, torch.uint64}
GROUP = "__torch__.torch.classes.c10d.ProcessGroup"


_launched: list[tuple[str, str]] | None = None


@contextmanager
def launches() -> Iterator[list[tuple[str, str]]]:
    """Record the collectives of this process in the order in which they are begun: the group's name, which is the same
    on all of its ranks, and the operation."""
    global _launched
    before, _launched = _launched, []
    try:
        yield _launched
    finally:
        _launched = before


def run_collective(func: Any, args: Any, kwargs: Any) -> Any:
    """Do a collective on the host's memory, by the group's backend for the device. Raises RuntimeError if it has
    none."""

    def real(value: Any) -> Any:
        if isinstance(value, torch.ScriptObject) and value._type().qualified_name() == GROUP:
            group = dist.ProcessGroup.unbox(value)
            if _launched is not None:
                _launched.append((group.group_name, func._schema.name))
            return _played(group).boxed()
        if isinstance(value, list | tuple):
            return type(value)(real(each) for each in value)
        if isinstance(value, Tensor):
            if value.dtype in NOT_IN_NCCL:
                refuse(f"Input tensor data type is not supported for NCCL process group: {value.dtype}")
            return on_host(value)
        if isinstance(value, torch.Tensor):
            refuse(f"No backend type associated with device type {value.device.type} ({func})")
        return value

    return made(func(*real(args), **{name: real(value) for name, value in kwargs.items()}), stays=True)


def _played(group: Any) -> Any:
    """A group of the same ranks and connections, for CPU tensors."""
    backend = group._get_backend(SHOWN)
    shadow = dist.ProcessGroup(group.rank(), group.size())
    shadow._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    shadow._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return shadow


class PlayedNccl(dist.ProcessGroupGloo):
    """Replacement of torch's ProcessGroupNCCL.

    Attributes:
        may_start: a communicator is starting until it is set, and its first operation waits, as torch's does.
        waits: operations that wait so: each adds an entry.
        aborted: ranks of the groups that were aborted.
    """

    may_start = threading.Event()
    may_start.set()
    waits: "Queue[int]" = Queue()
    aborted: "Queue[int]" = Queue()

    class Options:
        """Options of nccl, all ignored but for the timeout."""

        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(blocking=1)
            self._timeout = timedelta(minutes=10)

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        gloo: Any = dist.ProcessGroupGloo._Options()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        gloo._timeout = options._timeout
        super().__init__(store, rank, size, gloo)
        self._starting = threading.Lock()

    def allreduce(self, tensors: list[torch.Tensor], *args: Any) -> Any:  # type: ignore[override]
        """As called directly, not by `torch.distributed`."""
        with self._starting:
            if not self.may_start.is_set():
                self.waits.put(self.rank())
                self.may_start.wait()
        return super().allreduce([on_host(tensor) for tensor in tensors], *args)

    def abort(self) -> None:
        """Wait until the communicator has started, as torch's does."""
        with self._starting:
            super().abort()
        self.aborted.put(self.rank())


def _refusing_device_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of gloo's C++, which would otherwise take a device tensor's address for one of the host."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            for each in value if isinstance(value, list | tuple) else (value,):
                if isinstance(each, Tensor):
                    raise DeviceError(f"ProcessGroupGloo::{method.__name__}: unsupported device type cuda")
        return method(self, *args, **kwargs)

    return checked


def patch_distributed() -> None:
    """Have groups of backend nccl made of gloo, and gloo refuse tensors of the device."""
    for method in ("send", "recv", "allreduce", "broadcast", "allgather", "reduce", "alltoall_base"):
        setattr(dist.ProcessGroupGloo, method, _refusing_device_tensors(getattr(dist.ProcessGroupGloo, method)))
    module: Any = dist.distributed_c10d
    torch._C._get_accelerator = lambda check=None: SHOWN  # where a barrier's tensor is made
    module._NCCL_AVAILABLE = True
    module.ProcessGroupNCCL = dist.ProcessGroupNCCL = PlayedNccl  # type: ignore[attr-defined]
    module.default_pg_nccl_timeout = timedelta(minutes=10)


Tensor.collective = staticmethod(run_collective)
