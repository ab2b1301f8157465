"""The environment of processes that train."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

# As the product starts its workers: one arena, nothing by mmap, nothing given back. Else every step's large tensors
# come as fresh pages that the kernel has to clear.
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35)}


def worker_environment(threads: int, keep_memory: bool) -> dict[str, str]:
    """What is set for a training process on the CPU."""
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)} | (KEEP_MEMORY if keep_memory else {})


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
