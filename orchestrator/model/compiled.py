"""Dense parts of the model, compiled by `torch.compile` (inductor): norms, products and the elementwise operations
around them. Attention itself, routing, experts and the loss are kernels already, and stay as they are.

What is compiled are functions of a module and its inputs, not modules: all layers of one width, and all engines of a
process, share the code. Numbers of rows and tokens are symbols in it, so it is compiled once for all of them, but for
single rows or tokens, which torch always compiles apart, as it does passes without gradients. A micro-batch without
rows is computed eagerly. A process compiles in its warm-up (`orchestrator.worker.transition.warmup`).

The code depends on the sizes that it was first called with: inductor decides by them which loops threads share, and so
how sums are split, and torch's cache on disk gives it to other processes for any sizes. Where bits matter all
micro-batches have one shape, the warm-up's, and the cache is apart for that shape (`keep_code_apart`).
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from orchestrator.errors import UsageError
from orchestrator.model.transformer import Block

Function = TypeVar("Function", bound=Callable[..., object])
VARIANTS = 64  # of one function's code: by gradients, single rows and tokens, widths of layers; with more torch raises
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"  # of torch


_configured = threading.local()


def compiled(function: Function) -> Function:
    """The compiled function. Compiles at its first call, and at calls that the code doesn't fit."""
    if not hasattr(_configured, "done"):  # torch has these settings for each thread apart
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor
        from torch.fx.experimental import _config as symbols

        dynamo.recompile_limit = VARIANTS
        inductor.compile_threads = 1  # else a pool of processes stays, of some 200 MB each
        inductor.deterministic = True  # nothing is chosen by measured time
        inductor.fx_graph_remote_cache = False  # its code is of other sizes
        inductor.max_autotune = inductor.max_autotune_gemm = inductor.coordinate_descent_tuning = False
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


def keep_code_apart(*why: object) -> None:
    """Before anything is compiled: use a part of torch's cache on disk that is for processes with the same values."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    name = sha256(repr(why).encode()).hexdigest()[:16]
    base = os.environ.get(CACHE_DIR) or default_cache_dir()
    if Path(base).name != name:  # a child has it from its parent
        os.environ[CACHE_DIR] = os.path.join(base, name)


def compiler_of(device: torch.device) -> str:
    """Name and version of the compiler that inductor uses on a device.

    Raises:
        UsageError: it isn't there.
    """
    # Triton compiles the C code that starts its kernels.
    variable, usual = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    program = os.environ.get(variable) or usual
    if shutil.which(program) is None:
        raise _refusal(f"{program} isn't there", variable)
    lines = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.splitlines()
    version = lines[0] if lines else program
    if device.type == "cpu":
        return version
    try:
        import triton  # type: ignore[import-not-found]
    except ImportError as error:
        raise _refusal(str(error), variable) from error
    return f"triton {triton.__version__}, {version}"


def try_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        UsageError: it can't be done.
    """
    try:
        compiled(_tried)(torch.ones(4, device=device))
    # Of inductor, of the compiler, of the disk: all say that it can't be done here.
    except Exception as error:
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines if "error" in line.lower()), lines[0] if lines else "")
        raise _refusal(f"{type(error).__name__}: {reason}", "CXX" if device.type == "cpu" else "CC") from error


def _tried(x_N: Tensor) -> Tensor:
    return x_N.sin() + 1.0


def _refusal(why: str, variable: str) -> UsageError:
    return UsageError(
        f"layers can't be compiled on this node (train.torch_compile, --compile): {why}",
        remedy="Install a compiler with Python's headers (Debian: apt-get install g++ python3-dev), or name another "
        f"one in {variable}; or compute without compiling.",
    )
