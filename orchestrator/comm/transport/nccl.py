"""This process's nccl communicators, connected beforehand and aborted all at once. Not tried on a GPU yet.

An operation of an aborted communicator doesn't raise, and its result is undefined: aborts are counted by
`aborted`, and `orchestrator.worker.step.proven_sum` finds results that are not whole.
"""

import threading
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

_lock = threading.Lock()
_groups: "weakref.WeakSet[Any]" = weakref.WeakSet()
_aborted = 0


def nccl_group(store: Store, prefix: str, rank: int, size: int, timeout: timedelta) -> Any:
    """A connected nccl group on this process's GPU. Collective over its `size` members, in any thread.

    Raises:
        RuntimeError: a member did not connect.
    """
    options: Any = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.blocking = 0  # so that an abort ends it, also while it connects
    group: Any = dist.ProcessGroupNCCL(PrefixStore(prefix, store), rank, size, options)
    with _lock:
        _groups.add(group)
    group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return group


def abort_communicators() -> int:
    """Abort all communicators: operations waiting at either end are freed. From any thread. Returns how many."""
    global _aborted
    with _lock:
        groups = list(_groups)
        _groups.clear()
        _aborted += len(groups)  # first: who sees a freed operation finds that it was aborted
    for group in groups:
        group.abort()
    return len(groups)


def aborted() -> int:
    """Communicators of this process that were aborted so far."""
    return _aborted
