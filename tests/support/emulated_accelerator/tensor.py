"""Tensors of the emulated device."""

from collections.abc import Callable
from typing import Any

import torch

from tests.support.emulated_accelerator.refusals import DeviceError, refuse

NAME = "xla"  # the device in torch's C++, and in some of its messages
INTERNAL = torch.device(NAME, 0)
SHOWN = torch.device("cuda", 0)  # the device in Python code

_CPU = torch.device("cpu")
_empty = torch.empty  # as it is before the device is installed, which adds to it


class Tensor(torch.Tensor):
    """A tensor of the device, in the storage of a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # P
    run: Callable[..., Any]  # does an operation; set by `operations`
    collective: Callable[..., Any]  # does one of torch.distributed; set by `collectives`

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.run(func, *args, **(kwargs or {}))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return SHOWN

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return 0

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        if dtype is None:
            return torch.Tensor.type(self).replace(NAME, "cuda")
        if isinstance(dtype, str):
            kind = getattr(torch, dtype.rpartition(".")[2]).dtype
            return self.to(kind) if ".cuda." in dtype else self.cpu().to(kind)
        return self.to(dtype)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        mine = [INTERNAL if isinstance(a, str | torch.device) and is_emulated(a) else a for a in args]
        if kwargs.get("device") is not None and is_emulated(kwargs["device"]):
            kwargs["device"] = INTERNAL
        return torch.Tensor.to(self, *mine, **kwargs)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        return self.to(SHOWN if device is None else torch.device("cuda", device), non_blocking=non_blocking)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            refuse(
                f"can't convert {SHOWN} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first.",
                TypeError,
            )
        return self.detach().cpu().numpy()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        refuse(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy.__dict__.update(self.__dict__)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.detach().cpu(), self.requires_grad, dict(self.__dict__))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{torch.Tensor.__repr__(on_host(self))[:-1]}, device='{SHOWN}')"


def _rebuilt(value: torch.Tensor, requires_grad: bool, attributes: dict[str, Any]) -> torch.Tensor:
    tensor = value.to(SHOWN).requires_grad_(requires_grad)
    tensor.__dict__.update(attributes)
    return tensor


def on_device(value: torch.Tensor) -> Tensor:
    """The same memory as a tensor of the device."""
    value = value.resolve_conj().resolve_neg()
    make: Any = torch.Tensor._make_subclass  # P
    made: Tensor = make(Tensor, value, False, dispatch_device=True, device_for_backend_keys=INTERNAL)
    return made


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    flat = _empty(0, dtype=tensor.dtype, device=_CPU)
    return flat.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def is_emulated(device: Any) -> bool:
    """Whether a device is the emulated one, by either name. Raises DeviceError for another GPU."""
    device = torch.device(device) if not isinstance(device, torch.device) else device
    if device.type not in (NAME, "cuda"):
        return False
    if device.index not in (None, 0):
        raise DeviceError(f"CUDA error: invalid device ordinal ({device}; there is {SHOWN} alone)")
    return True
