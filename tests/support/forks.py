"""Processes that begin with torch, deepspeed and our workers imported, which takes 4 s of a core: forked from one that
has done nothing else.

process = forks.start(function, pipe)
"""

import contextlib
import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.forks_preload"])

STRICT = 0x10002  # what MKL makes of MKL_CBWR=AUTO,STRICT, where it can
ROOT = Path(__file__).parents[2]


def start(function: Callable[..., None], *args: Any) -> BaseProcess:
    """A process that runs `function(*args)`, which has to call `begin`, and ends with this one."""
    with contextlib.chdir(ROOT):  # from there it imports: whatever of ours can't be found is passed over
        forkserver.ensure_running()
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def begin(env: Mapping[str, str]) -> None:
    """First of all in such a process: it inherits the environment that its test's process had at the first fork."""
    assert "tests.support.forks_preload" in sys.modules, "the process that is forked has not imported what it should"
    os.environ.update(env)
    import torch

    if "MKL_CBWR" in env and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        get = getattr(library, "mkl_serv_cbwr_get", None)  # a torch without MKL has none
        assert get is None or get(-1) == STRICT, "MKL was used before the fork: it reads its environment only once"
