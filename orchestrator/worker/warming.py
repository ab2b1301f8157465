"""Warming a standby: everything that would otherwise be paid at its first fence.

Imports, the first engine of the process (1.5 s; later ones take a few hundredths), one step of a tiny model, and a
frozen garbage collector, so that a collection doesn't walk through DeepSpeed's and torch's modules again and again.
"""

import ctypes
import gc
import mmap
import os
import threading
from contextlib import suppress
from datetime import timedelta

import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.placement import Placement
from orchestrator.engine.deepspeed_engine import DeepSpeedEngineAdapter
from orchestrator.engine.groups import connect, disconnect
from orchestrator.model.batch import MicroBatch
from orchestrator.model.building import alone
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.policy.planning import MemoryPlan
from orchestrator.spec.job import JobSpec

MADV_POPULATE_WRITE = 23  # Linux 5.14: pages are there as after a write, and keep what they hold


class ReservedMemory:
    """Memory that the system has given this process before a fence or a step waits for it.

    Workers keep what they have freed (`orchestrator.control.crew`), so no fence waits for the kernel to find and clear
    pages, which takes a virtual machine a second per GB where its host has to find them first. What a newcomer's first
    fence fills is touched at once. What it will have beside that at most is touched at the lowest priority, while it
    stands by or has joined, and is free meanwhile: whatever is allocated there first keeps its content.

    Args:
        planned: of the world that the worker is for, as `orchestrator plan` shows it.
    """

    PIECE = 1 << 22  # bytes touched at once

    def __init__(self, planned: MemoryPlan) -> None:
        first = torch.empty(planned.engine, dtype=torch.uint8)
        later = torch.empty(planned.peak - planned.process - planned.engine, dtype=torch.uint8)  # behind it
        first.fill_(1)
        page = mmap.PAGESIZE
        begin = -(-later.data_ptr() // page) * page
        self._pieces = range(begin, (later.data_ptr() + len(later)) // page * page, self.PIECE)

    def touch_the_rest(self) -> None:
        """Returns at once."""
        threading.Thread(target=self._touch, name="memory", daemon=True).start()

    def _touch(self) -> None:
        with suppress(AttributeError, OSError):  # of this thread alone; Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        libc = ctypes.CDLL(None)
        for begin in self._pieces:
            size = min(self.PIECE, self._pieces.stop - begin)
            if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
                return  # an older kernel: the rest is touched by those who use it


def warm_up(spec: JobSpec, vocab_size: int, device: torch.device, address: str) -> None:
    """Build a small engine of the job's kind in a world of one, do one step, throw it away.

    Args:
        address: where this process can be reached: its first gloo group decides that for all others.
    """
    sizes = {"num_layers": 2, "num_dense_layers": 1, "num_experts": spec.model.top_k}
    small = spec.model.model_copy(update=sizes | {"num_expert_groups": 1, "top_k_groups": 1})
    store = HashStore()
    store.set_timeout(timedelta(seconds=30))
    placement = Placement.balanced(small.num_experts, 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    groups = connect(store, "warm-up", 0, placement, backend, address=address)
    try:
        with device:
            model = MoELanguageModel(small, vocab_size, alone(small))
            tokens_BU = torch.zeros(1, spec.train.sequence_length + 1, dtype=torch.int64)
        model.init_weights(0)
        engine = DeepSpeedEngineAdapter(model, spec.train, groups, device, spec.communication)
        engine.seeded()
        engine.accumulate(MicroBatch(tokens_BU[:, :-1], tokens_BU[:, 1:]), spec.train.sequence_length, last=True)
        engine.step(0.0)
        engine.close()
    finally:
        disconnect()
    del engine, model
    gc.collect()
    gc.freeze()
