"""The environment of processes that train."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from orchestrator.controller.worker_env import WORKER_ENV


def worker_environment(threads: int, keep_memory: bool, on_gpu: bool = False) -> dict[str, str]:
    """For a training process; `keep_memory`: with the malloc settings that the product gives its workers."""
    device = {} if on_gpu else {"DS_ACCELERATOR": "cpu"}
    return device | {"OMP_NUM_THREADS": str(threads)} | (WORKER_ENV if keep_memory else {})


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set for the processes that are started within; as it was afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
