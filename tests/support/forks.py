"""Processes that begin with torch, deepspeed and our workers imported, which takes 4 s of a core: forked from one that
has done nothing else.

context.Process(target=function, args=(pipe,))
"""

import ctypes
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.forks_preload"])

STRICT = 0x10002  # what MKL makes of MKL_CBWR=AUTO,STRICT


def begin(env: Mapping[str, str]) -> None:
    """First of all in such a process: it inherits the environment that its test's process had at the first fork."""
    os.environ.update(env)
    if "MKL_CBWR" in env:
        import torch

        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        get = getattr(library, "mkl_serv_cbwr_get", None)  # a torch without MKL has none
        assert get is None or get(-1) == STRICT, "MKL was used before the fork: it reads its environment only once"
