"""Warming a standby: everything that would otherwise be paid at its first fence.

Imports, the first engine of the process (1.5 s; later ones take a few hundredths), one step of a tiny model, and a
frozen garbage collector, so that a collection doesn't walk through DeepSpeed's and torch's modules again and again.
"""

import gc
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import HashStore

from orchestrator.elastic.layout import kept_tensors
from orchestrator.elastic.placement import Placement
from orchestrator.engine.deepspeed_engine import DeepSpeedEngineAdapter
from orchestrator.engine.groups import connect, disconnect
from orchestrator.model.batch import MicroBatch
from orchestrator.model.building import alone, catalogue
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.job import JobSpec
from orchestrator.spec.protection import OFF, whole_every


@dataclass(frozen=True)
class WorldMemory:
    """Bytes that a worker needs in one world.

    Args:
        trained: its shard and its gradients, which its first fence fills.
        kept: the snapshots of its own and of others that it keeps, which the steps after it fill.
    """

    trained: int
    kept: int


def memory_of_a_world(spec: JobSpec, vocab_size: int) -> WorldMemory:
    """Of a world of `workers.initial`; a smaller one may have to ask the system for more."""
    params, _, _ = catalogue(spec.model, vocab_size)
    world_size = spec.workers.initial
    dense = sum(p.numel for p in params if p.expert is None)
    experts = sum(p.numel for p in params if p.expert is not None) / min(world_size, spec.model.num_experts)
    weight_bytes = 2 if spec.train.precision == "bf16" else 4
    feedback = sum(4 * numel for _, numel, _ in kept_tensors(params, spec.communication))
    state = (dense + experts) * weight_bytes + 3 * 4 * (dense / world_size + experts) + feedback
    own = 2 * state  # two snapshots, the one being written included
    kept = 2 * (3 * 4 * (dense / world_size + experts) + experts * weight_bytes + feedback)
    if (every := whole_every(spec.protection, spec.recovery.whole_every)) > 1:
        delta = 4 * (dense / world_size + experts) + feedback
        own, kept = own + every * (delta + dense * weight_bytes) + delta, kept + every * delta
    gradients = (dense + experts) * (8 if spec.train.is_exact else weight_bytes)
    protected = spec.protection != OFF and spec.workers.max > 1
    return WorldMemory(int(state + gradients), int(own + kept) if protected else 0)


class ReservedMemory:
    """Memory that was asked of the system and touched, and given back to the allocator, before anybody waits for it.

    Workers keep what they have freed (`orchestrator.control.crew`), so no fence waits for the kernel to find and clear
    pages, which takes a virtual machine a second per GB where its host has to find them first. What a newcomer's first
    fence fills is touched at once. What the steps after it need, and its second fence, with an old and a new world, is
    touched at the lowest priority, while the worker stands by or has joined: piece by piece, each given back as soon as
    it is touched.
    """

    PIECE = 1 << 25  # bytes touched at once

    def __init__(self, world: WorldMemory) -> None:
        first = torch.empty(world.trained, dtype=torch.uint8)
        later = world.trained + 2 * world.kept
        self._later = [torch.empty(self.PIECE, dtype=torch.uint8) for _ in range(later // self.PIECE)]  # behind it
        first.fill_(1)

    def touch_the_rest(self) -> None:
        """Returns at once."""
        threading.Thread(target=self._touch, name="memory", daemon=True).start()

    def _touch(self) -> None:
        with suppress(AttributeError, OSError):  # of this thread alone; Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._later.reverse()
        while self._later:
            self._later.pop().fill_(1)


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
