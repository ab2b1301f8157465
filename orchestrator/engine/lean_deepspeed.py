"""Imports DeepSpeed without what no worker uses and every worker would wait for.

- MLflow, for DeepSpeed's autotuner: a second and 110 MB.
- torch's compiler, for the kernels of an optimizer called Muon, which DeepSpeed imports in its first reduction of
  gradients: a second more. They stay uncompiled here; whatever a model compiles itself is.
- The compiler once more, for which torch's optimizers would mark their methods as not to be compiled.

Import this module before `deepspeed`. Whoever imports MLflow later gets it.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _leave_unmarked(kind: type) -> None:
    """`torch._disable_dynamo` loads the compiler at a method's first call, unless the method is marked already."""
    for method in vars(kind).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            setattr(wrapped, "__dynamo_disable", wrapped)


_leave_unmarked(torch.optim.Optimizer)
with _without("mlflow"), _environment("TORCHDYNAMO_DISABLE", "1"):
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
