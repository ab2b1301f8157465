"""Installation of the emulated device in this process."""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

from tests.support.emulated_accelerator.collectives import patch_distributed
from tests.support.emulated_accelerator.cuda import patch_cuda
from tests.support.emulated_accelerator.operations import run
from tests.support.emulated_accelerator.refusals import refuse
from tests.support.emulated_accelerator.tensor import NAME, SHOWN, Tensor

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # C++ symbol of the registry of device guards

_libraries: list[Any] = []  # registrations with torch, which end with these objects


def install() -> torch.device:
    """Make the emulated device this process's only one, until it ends. Idempotent.

    Call it before a first backward pass, and before anything looks for a GPU. DeepSpeed may have chosen the CPU before.

    Raises:
        RuntimeError: the process has a real GPU.
    """
    if _libraries:
        return SHOWN
    if torch.cuda.is_available():
        raise RuntimeError("this process has a GPU, which an emulated one would hide")
    _install_guards()
    everything, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    for key in (NAME.upper(), "CUDA"):
        everything.fallback(run, key)
    for operation in ("silu_backward", "mish_backward"):  # else torch would compose them, where the CPU has a kernel
        kernels.impl(operation, functools.partial(run, getattr(torch.ops.aten, operation).default), NAME.upper())
    kernels.impl("_copy_from", _copy_from, NAME.upper())
    _libraries.extend((everything, kernels))
    _patch_host_tensors()
    patch_cuda()
    patch_distributed()
    return SHOWN


def _copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> Any:
    """Fill the tensor of `torch.tensor(..., device=...)`, which doesn't consult subclasses."""
    return run(torch.ops.aten.copy_.default, to, source)


def _install_guards() -> None:
    """Register device guards, which torch's C++ asks for the current device and stream.

    The emulated device gets the CPU's, which does nothing. `cuda` without a number gets one that answers with the
    emulated device; and as it answers that there is one, autograd starts a thread for it.
    """

    class Guard(torch._C._acc.DeviceGuard):  # P
        def type_(self) -> Any:
            return kind.XLA

    kind: Any = torch._C._autograd.DeviceType  # type: ignore[attr-defined]
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so"))
    guards = (ctypes.c_void_p * (int(kind.PrivateUse1) + 1)).in_dll(library, GUARDS)  # P
    torch._C._acc.register_python_privateuseone_device_guard(Guard())  # P
    guards[int(kind.CUDA)], guards[int(kind.XLA)] = guards[int(kind.PrivateUse1)], guards[int(kind.CPU)]
    guards[int(kind.PrivateUse1)] = None


def _patch_host_tensors() -> None:
    """Mark ordinary memory as pinned where pinned memory is requested."""

    def factory(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            tensor = make(*args, **kwargs)
            return _pinned(tensor) if pin_memory else tensor

        return pinning

    def is_pinned(self: torch.Tensor, device: Any = None) -> bool:
        return hasattr(self.untyped_storage(), "is_marked_as_pinned")

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        return self if self.is_pinned() else _pinned(self.clone())

    _device._device_constructors()  # P; `with device:` keeps the functions that it finds when it is first used
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "tensor", "empty_like", "zeros_like"):
        setattr(torch, name, factory(getattr(torch, name)))
    torch.Tensor.is_pinned, torch.Tensor.pin_memory = is_pinned, pin_memory  # type: ignore[method-assign,assignment]


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Tensor):
        refuse("Only dense CPU tensors can be pinned")
    tensor.untyped_storage().is_marked_as_pinned = True  # type: ignore[attr-defined]
    return tensor
