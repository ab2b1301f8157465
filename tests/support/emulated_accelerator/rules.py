"""An operation by its schema, and what CUDA refuses of it."""

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.emulated_accelerator.refusals import refuse
from tests.support.emulated_accelerator.tensor import SHOWN, Tensor

# Operations that aren't treated as every other one is. By name, of all overloads.
COPIES = {"copy_", "_to_copy", "copy", "_foreach_copy_"}  # between devices
TAKES_CPU_NUMBERS = {"fill_", "fill", "masked_fill_", "masked_fill", "index_put_", "index_put", "_index_put_impl_"}
TAKES_CPU_INDICES = {"index", "index_put_", "index_put", "_index_put_impl_"}
RESIZING = {"resize_", "set_"}
NOT_DETERMINISTIC = {  # on CUDA, by torch.use_deterministic_algorithms, and under which condition
    "bincount": lambda named: named.get("weights") is not None,
    "cumsum": lambda named: named["self"].is_floating_point() or named.get("dtype") in (torch.float32, torch.float64),
    "put_": lambda named: not named.get("accumulate"),
    **dict.fromkeys(("histc", "kthvalue", "median", "nll_loss2d_forward", "_ctc_loss"), lambda named: True),
}
MULTIPLE = 16  # sizes of a product in float8, on GPUs since compute capability 8.9
CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "mv", "dot"}

generator = torch.Generator()  # the device's: it draws other numbers than the CPU's


@dataclass(frozen=True)
class Form:
    """An operation by its schema.

    Args:
        names: of its arguments.
        written: those whose memory it writes to.
        results: by result, the argument that it is; None for a new tensor.
    """

    name: str
    names: tuple[str, ...]
    written: frozenset[str]
    results: tuple[str | None, ...]
    is_pointwise: bool
    is_resizing: bool
    is_sync: bool
    draws: bool


def _label(argument: Any) -> str | None:
    """The label that an argument that is written to shares with its result; None for others."""
    alias = argument.alias_info
    return next(iter(alias.before_set), "") if alias is not None and alias.is_write else None


@functools.cache
def form_of(func: Any) -> Form:
    """The form of an ATen overload."""
    schema, tags = func._schema, func.tags
    written = {a.name: label for a in schema.arguments if (label := _label(a)) is not None}
    given = {label: name for name, label in written.items()}
    name = schema.name.partition("::")[2]
    return Form(
        name=name,
        names=tuple(a.name for a in schema.arguments),
        written=frozenset(written),
        results=tuple(given.get(_label(result)) for result in schema.returns),
        is_pointwise=torch.Tag.pointwise in tags or name.startswith("_foreach_"),
        is_resizing=torch.Tag.inplace_view in tags or torch.Tag.out in tags or name in RESIZING,
        is_sync=torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags,
        draws=any(a.name == "generator" for a in schema.arguments),
    )


def check(form: Form, named: dict[str, Any]) -> None:
    """Refuse what CUDA would refuse of these arguments."""
    on_device, others, given = False, [], None
    for name, value in named.items():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor):
                on_device = True
            elif isinstance(each, torch.Tensor) and not _may_be_on_cpu(form, name, each):
                others.append(name)
            elif isinstance(each, torch.Generator):
                given = each
    if not on_device:
        return
    if others:
        refuse(
            f"Expected all tensors to be on the same device, but found at least two devices, {SHOWN} and cpu! "
            f"(argument {others[0]} of {form.name})"
        )
    if form.name == "_scaled_mm":
        _check_scaled(named["self"], named["mat2"])
    if given is not None and given is not generator:
        refuse(f"Expected a 'cuda' device type for generator but found 'cpu' ({form.name})")
    if torch.are_deterministic_algorithms_enabled():
        if form.name in NOT_DETERMINISTIC and NOT_DETERMINISTIC[form.name](named):
            refuse(f"{form.name} does not have a deterministic implementation on CUDA")
        if form.name in CUBLAS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
            refuse("Deterministic behavior needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment")


def _check_scaled(left: Any, right: Any) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        refuse("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")
    if left.dtype == right.dtype == torch.float8_e5m2:
        refuse("Multiplication of two Float8_e5m2 matrices is not supported")
    if not left.is_contiguous() or not right.t().is_contiguous():
        refuse("Only multiplication of row-major and column-major matrices is supported by cuBLASLt")
    if any(size % MULTIPLE for size in (left.shape[1], *right.shape)):
        refuse(f"Expected sizes to be divisible by 16, got {tuple(left.shape)} and {tuple(right.shape)}")


def _may_be_on_cpu(form: Form, name: str, value: torch.Tensor) -> bool:
    if form.name in COPIES:
        return True
    if name == "indices":
        return form.name in TAKES_CPU_INDICES
    takes_numbers = form.is_pointwise or form.name in TAKES_CPU_NUMBERS or (name, form.name[:7]) == ("lr", "_fused_")
    return value.dim() == 0 and takes_numbers and name not in form.written


def copies_to_host(form: Form, named: dict[str, Any], stays: bool) -> bool:
    """Whether the operation copies from the device to the host. `stays`: its result is on the device."""
    if form.name not in COPIES:
        return False
    return not stays or (isinstance(named.get("src"), Tensor) and not isinstance(named["self"], Tensor))


def waits(form: Form, named: dict[str, Any], stays: bool) -> bool:
    """Whether the host waits for the device: for a value, for a size that depends on values, or for a copy to the
    device that isn't `non_blocking`."""
    if form.name in TAKES_CPU_INDICES:
        given = [each for each in named["indices"] if each is not None]
        return any(each.dtype is torch.bool or not isinstance(each, Tensor) for each in given)
    if form.name in COPIES and stays and not named.get("non_blocking"):
        source = named.get("src", named.get("self"))
        return any(not isinstance(each, Tensor) for each in (source if isinstance(source, list) else [source]))
    return form.is_sync
