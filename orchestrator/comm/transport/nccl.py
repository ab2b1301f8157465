"""This process's nccl communicators, connected beforehand and aborted all at once. Not tried on a GPU yet.

A communicator is initialised in the background, without blocking nccl, and torch has no call that asks whether it is
ready: `_is_initialized` answers yes only after something has used the communicator, and what uses it waits with a lock
that an abort needs too (torch 2.13, `NCCLComm::getNcclComm`). So a thread of its own runs a first operation, one number
over all ranks, and a group counts as connected once that has its result. Communicators that are still starting are
given up without waiting for them.

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
_starting: "set[_Start]" = set()
_aborted = 0


def nccl_group(store: Store, prefix: str, rank: int, size: int, timeout: timedelta) -> Any:
    """A connected nccl group on this process's GPU. Collective over its `size` members, in any thread.

    Raises:
        RuntimeError: a member did not connect within `timeout`, or the group was aborted meanwhile.
    """
    options: Any = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.blocking = 0  # so that an abort ends it, also while it connects
    start = _Start(dist.ProcessGroupNCCL(PrefixStore(prefix, store), rank, size, options))
    with _lock:
        _starting.add(start)
    device = torch.device("cuda", torch.cuda.current_device())
    threading.Thread(target=start.run, args=(device,), name="nccl", daemon=True).start()
    start.is_over.wait(timeout.total_seconds())
    with _lock:
        _starting.discard(start)
        if start.is_connected:
            _groups.add(start.group)
            return start.group
        start.give_up(f"not all of its {size} members connected within {timeout.total_seconds():g} s")
    raise RuntimeError(f"the nccl group {prefix} is not connected: {start.reason}")


class _Start:
    """The first operation of a group. Attributes change with the lock held."""

    def __init__(self, group: Any) -> None:
        self.group, self.is_over = group, threading.Event()
        self.is_connected = self.is_given_up = False
        self.reason = ""

    def run(self, device: torch.device) -> None:
        reason = ""
        try:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                self.group.allreduce([torch.ones(1, device=device)]).wait()
            stream.synchronize()
        except Exception as error:  # of any kind: `nccl_group` raises it
            reason = f"{type(error).__name__}: {error}"
        with _lock:
            if not self.is_given_up:
                self.is_connected, self.reason = not reason, reason
                self.is_over.set()
                return
        self.group.abort()  # what was made since it was given up

    def give_up(self, reason: str) -> None:
        """Abort the communicator in a thread: torch holds the abort's lock while the communicator starts."""
        if self.is_given_up:
            return
        self.is_connected, self.is_given_up, self.reason = False, True, self.reason or reason
        threading.Thread(target=self.group.abort, name="nccl-abort", daemon=True).start()
        self.is_over.set()


def abort_communicators() -> int:
    """Abort all communicators: operations waiting at either end are freed. From any thread. Returns how many."""
    global _aborted
    with _lock:
        groups, starting = list(_groups), list(_starting)
        _groups.clear()
        _starting.clear()
        _aborted += len(groups) + len(starting)  # first: who sees a freed operation finds that it was aborted
        for start in starting:
            start.give_up("it was aborted")
    for group in groups:
        group.abort()
    return len(groups) + len(starting)


def aborted() -> int:
    """Communicators of this process that were aborted so far."""
    return _aborted
