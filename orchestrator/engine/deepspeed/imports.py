"""Imports DeepSpeed without what no worker uses and every worker would wait for.

- MLflow, for DeepSpeed's autotuner: a second and 110 MB.
- torch's compiler: two seconds. DeepSpeed imports the kernels of an optimizer called Muon, compiled, in its first
  reduction of gradients; here they stay uncompiled. And DeepSpeed's engine and torch's optimizers mark what mustn't be
  compiled, which loads the compiler at the first call; here it stays unmarked. Whatever a model compiles itself is.

Import this module before `deepspeed`. Whoever imports MLflow later gets it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Its import fails, as if it were not installed, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def _unchanged_by(*decorators: str) -> Iterator[None]:
    """What these decorators of torch are put on stays as it is."""

    def decorator(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    before = {name: getattr(torch, name) for name in decorators}
    for name in decorators:
        setattr(torch, name, decorator)
    try:
        yield
    finally:
        for name, found in before.items():
            setattr(torch, name, found)


def _leave_unmarked(kind: type) -> None:
    """`torch._disable_dynamo` loads the compiler at a method's first call, unless the method is marked already."""
    for method in vars(kind).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            setattr(wrapped, "__dynamo_disable", wrapped)


_leave_unmarked(torch.optim.Optimizer)
with _without("mlflow"), _unchanged_by("compile", "_disable_dynamo"):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
