"""Engines side by side in one rank, whose gradients travel in different ways, or not at all."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from benchmarks.harness import alternate
from orchestrator.comm.reduction import Alone, Reducer, Reduction
from orchestrator.elastic.placement import Placement
from orchestrator.engine.deepspeed_engine import DeepSpeedEngineAdapter
from orchestrator.engine.groups import connect
from orchestrator.model.batch import MicroBatch
from orchestrator.model.moe import ExpertHome
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import TrainSpec

VOCAB, ROWS, LENGTH = 2048, 4, 128
STEPS = 2  # of an arm in a round
COMPRESSION = {"scheme": "topk", "share": 0.05}
ARMS: dict[str, dict[str, Any]] = {
    "free": {},
    "blocking": {"overlap": False},
    "overlapped": {},
    "compressed": {"compression": COMPRESSION},
}


@dataclass(frozen=True)
class Settings:
    """What every rank is told."""

    model: dict[str, Any]
    bucket_mb: float
    rounds: int


class Free(Reducer):
    """Sends nothing: a rank's own terms are taken for the sum."""

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        return Alone(flat.view(self.num_pieces, -1)[self._rank].clone(), keeps_rest=False)


def steps_of_arms(
    rank: int, world_size: int, store: Store, prefix: str, address: str, settings: Settings
) -> dict[str, list[float]]:
    """Seconds of a step by arm and round, as this rank sees them."""
    placement = Placement.balanced(settings.model["num_experts"], world_size)
    groups = connect(store, prefix, rank, placement, "gloo", address=address)
    model_spec = ModelSpec(**settings.model)
    arms: dict[str, Callable[[], float]] = {}
    for name, changes in ARMS.items():
        spec = CommunicationSpec.model_validate({"bucket_mb": settings.bucket_mb, **changes})
        model = MoELanguageModel(model_spec, VOCAB, ExpertHome(placement, rank, groups.exchange))
        engine = DeepSpeedEngineAdapter(model, TrainSpec(sequence_length=LENGTH), groups, torch.device("cpu"), spec)
        model.init_weights(0)
        engine.seeded()
        if name == "free":
            for bucket in engine._gradients._buckets:
                bucket.reduction = Free(bucket.reduction._group, False)
        arms[name] = _stepper(engine, rank)
    for step in arms.values():
        step()  # memory and routes are not those of the first step any more
    return alternate(arms, settings.rounds)


def _stepper(engine: DeepSpeedEngineAdapter, rank: int) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(rank)
    global_tokens = ROWS * LENGTH * dist.get_world_size()

    def steps() -> float:
        dist.barrier()
        began_s = time.perf_counter()
        for _ in range(STEPS):
            tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
            engine.accumulate(MicroBatch(tokens[:, :-1], tokens[:, 1:]), global_tokens, last=True)
            engine.step(1e-4)
        dist.barrier()
        return (time.perf_counter() - began_s) / STEPS

    return steps
