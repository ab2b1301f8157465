"""Imports DeepSpeed without modules that no worker uses and every worker would wait for.

- MLflow, for DeepSpeed's autotuner: a second and 110 MB.
- torch's compiler: two seconds. DeepSpeed imports the kernels of an optimizer called Muon, compiled, in its first
  reduction of gradients; here they stay uncompiled. Also, DeepSpeed's engine and torch's optimizers mark functions not
  to be compiled, which loads the compiler at the first call; here they stay unmarked. A model can still compile itself.

Import this module before `deepspeed`. Later imports of MLflow work.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Make an import of `module` fail, as if it were not installed, unless it is loaded already."""
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
    """Replace these decorators of torch by ones that change nothing."""

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
    """Mark methods beforehand: `torch._disable_dynamo` loads the compiler at an unmarked method's first call."""
    for method in vars(kind).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            setattr(wrapped, "__dynamo_disable", wrapped)


_leave_unmarked(torch.optim.Optimizer)
with _without("mlflow"), _unchanged_by("compile", "_disable_dynamo"):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
