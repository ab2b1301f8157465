"""Operations on tensors of the emulated device, done on the processor."""

import threading
from typing import Any

import torch

from tests.support.emulated_accelerator.refusals import count_sync, refuse
from tests.support.emulated_accelerator.rules import Form, check, copies_to_host, form_of, generator, waits
from tests.support.emulated_accelerator.tensor import INTERNAL, Tensor, is_emulated, on_device, on_host

GARBAGE = 90  # a number of any format

_under_way: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies to the host until it waits: (destination, values)
_copying = threading.RLock()


def settle(*args: Any, **kwargs: Any) -> None:
    """Wait for the device: copies to the host are complete, also those that another thread began or is completing."""
    with _copying:
        while _under_way:
            to, values = _under_way.pop()
            to.copy_(values)


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation of torch that takes tensors of the device, or makes some. Raises DeviceError where CUDA would."""
    if func is torch.ops.prim.device.default:
        return INTERNAL
    if func.namespace == "c10d":
        return Tensor.collective(func, args, kwargs)
    form = form_of(func)
    if form.name == "record_stream":
        return None
    named = dict(zip(form.names, args, strict=False)) | kwargs
    check(form, named)
    wanted = named.get("device")
    stays = wanted is None or is_emulated(wanted)
    to_host = copies_to_host(form, named, stays)
    is_under_way = to_host and bool(named.get("non_blocking")) and (not stays or named["self"].is_pinned())
    if (to_host and not is_under_way) or waits(form, named, stays):
        settle()
        count_sync(form.name)
    real = {name: _on_host(value) for name, value in named.items()}
    if wanted is not None:
        real["device"] = torch.device("cpu")
    if real.get("pin_memory"):
        if stays:
            refuse("Only dense CPU tensors can be pinned")
        real["pin_memory"] = False
    if form.draws and named.get("generator") is None:
        real["generator"] = generator
    positional = [real.pop(name) for name in form.names[: len(args)]]
    results = func(*positional, **real)
    real = dict(zip(form.names, positional, strict=False)) | real
    if form.is_resizing:
        for name in form.written:
            _follow(named.get(name), real.get(name))
    if is_under_way:
        with _copying:
            _under_way.append((results, results.clone()))
            results.fill_(float("nan") if results.is_floating_point() else GARBAGE)
    return _results(form, named, results, stays)


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_host(value)
    if isinstance(value, list | tuple):
        return type(value)(_on_host(each) for each in value)
    return value


def _results(form: Form, named: dict[str, Any], results: Any, stays: bool) -> Any:
    """What was given and written to, as it was given; what is new, as a tensor of the device."""
    if len(form.results) == 1:
        return named[form.results[0]] if form.results[0] is not None else made(results, stays)
    if isinstance(results, tuple) and len(results) == len(form.results):
        pairs = zip(form.results, results, strict=True)
        return tuple(named[name] if name is not None else made(result, stays) for name, result in pairs)
    return made(results, stays)


def made(result: Any, stays: bool) -> Any:
    """A result as a tensor of the device, if that is where it `stays`."""
    if isinstance(result, torch.Tensor):
        return on_device(result) if stays and not isinstance(result, Tensor) else result
    if isinstance(result, list | tuple):
        return type(result)(made(each, stays) for each in result)
    return result


def _follow(tensor: Any, real: Any) -> None:
    """The operation may have changed a given tensor's size, or where it lies."""
    if isinstance(tensor, list | tuple):
        for each, its_real in zip(tensor, real, strict=True):
            _follow(each, its_real)
    elif isinstance(tensor, Tensor):
        before = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata)
        if before != (real.shape, real.stride(), real.storage_offset(), real.untyped_storage()._cdata):
            tensor.data = on_device(real)


Tensor.run = staticmethod(run)
