"""Dense parts of the model, compiled by `torch.compile` (inductor): norms, products and the elementwise operations
around them. Attention itself, routing, experts and the loss are kernels already, and stay as they are.

What is compiled are functions of a module and its inputs, not modules: all layers, and all engines of a process, share
the code. Numbers of rows and tokens are symbols in it, so it is compiled once for all of them, but for ones, which
torch always compiles apart. A process compiles in its warm-up (`orchestrator.worker.transition.warmup`).

The code may depend on the sizes that it was first called with: inductor decides by them which loops threads share, and
so how sums are split. Where bits matter all micro-batches have one shape, the warm-up's.
"""

import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import torch
from torch import nn

from orchestrator.errors import UsageError
from orchestrator.model.transformer import Block

Function = TypeVar("Function", bound=Callable[..., object])
VARIANTS = 64  # of one function's code: with and without gradients, of single rows and tokens, by what is trained


_configured = threading.local()


def compiled(function: Function) -> Function:
    """The compiled function. Compiles at its first call, and at calls that the code doesn't fit."""
    if not hasattr(_configured, "done"):  # torch has these settings for each thread apart
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor
        from torch.fx.experimental import _config as symbols

        dynamo.recompile_limit = VARIANTS
        inductor.compile_threads = 1  # else a pool of processes stays, of some 200 MB each
        symbols.use_duck_shape = False  # sizes that are equal in the first call may differ in the next
        _configured.done = True
    made: Function = _compiled(function)
    return made


@cache
def _compiled(function: Function) -> Function:
    made = torch.compile(function, dynamic=True, fullgraph=True)
    return cast(Function, made)


def compile_parts(model: nn.Module) -> None:
    """Have the layers of our own model compute their dense parts compiled."""
    for module in model.modules():
        if isinstance(module, Block):
            module.part = compiled


def compiler_of(device: torch.device) -> str:
    """Name and version of the compiler that inductor uses on a device.

    Raises:
        UsageError: a processor has none.
    """
    if device.type != "cpu":
        import triton  # type: ignore[import-not-found]

        return f"triton {triton.__version__}"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        path = get_cpp_compiler()
    except InvalidCxxCompiler:
        path = ""
    if not path or shutil.which(path) is None:
        raise UsageError(
            "compiled layers (train.torch_compile, --compile) need a C++ compiler on each node, and this one has none",
            remedy="Install one (Debian: apt-get install g++), or name it in CXX; or compute without compiling.",
        )
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return told.splitlines()[0]
