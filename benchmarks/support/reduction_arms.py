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
from orchestrator.comm import traffic_meter
from orchestrator.comm.gradients.reduce_scatter import LocalReduction, Reducer, Reduction
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.usage import TrafficKind
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import TrainSpec

VOCAB, ROWS, LENGTH = 2048, 4, 128
STEPS = 2  # of an arm in a round
FREE = "free"  # the arm whose gradients go nowhere


@dataclass(frozen=True)
class Settings:
    """What every rank is told.

    Args:
        arms: by name, what a job would say of `communication`.
    """

    arms: dict[str, dict[str, Any]]
    model: dict[str, Any]
    bucket_mb: float
    rounds: int


class Free(Reducer):
    """Sends nothing: a rank's own terms are taken for the sum."""

    def start(self, flat: Tensor, cleared: Tensor | None = None) -> Reduction:
        return LocalReduction(flat.view(self.num_pieces, -1)[self._rank].clone(), keeps_rest=False)


def steps_of_arms(
    rank: int, world_size: int, store: Store, prefix: str, address: str, settings: Settings
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of a step by arm and round, and bytes of tokens that this rank sends in a step, by arm."""
    placement = ExpertPlacement.balanced(settings.model["n_routed_experts"], world_size)
    groups = connect(store, prefix, rank, placement, "gloo", address=address)
    model_spec = ModelSpec(**settings.model)
    arms: dict[str, Callable[[], float]] = {}
    for name, changes in settings.arms.items():
        spec = CommunicationSpec.model_validate({"bucket_mb": settings.bucket_mb, **changes})
        model = MoELanguageModel(
            model_spec, VOCAB, ExpertParallelContext(placement, rank, groups.exchange, spec.tokens)
        )
        engine = DeepSpeedEngineAdapter(model, TrainSpec(sequence_length=LENGTH), groups, torch.device("cpu"), spec)
        model.init_weights(0)
        engine.on_weights_initialized()
        if name == FREE:
            for bucket in engine._gradients._buckets:
                bucket.reduction = Free(bucket.reduction._group, False)
        arms[name] = _stepper(engine, rank)
    tokens = {}
    for name, step in arms.items():
        since = traffic_meter.Since()
        step()  # memory and routes are not those of the first step any more
        seen = since.look()
        tokens[name] = (seen[TrafficKind.DISPATCH].sent + seen[TrafficKind.COMBINE].sent) // STEPS
    return alternate(arms, settings.rounds), tokens


def _stepper(engine: DeepSpeedEngineAdapter, rank: int) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(rank)
    global_tokens = ROWS * LENGTH * dist.get_world_size()

    def steps() -> float:
        dist.barrier()
        began_s = time.perf_counter()
        for _ in range(STEPS):
            tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
            engine.accumulate({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, global_tokens, last=True)
            engine.step(1e-4)
        dist.barrier()
        return (time.perf_counter() - began_s) / STEPS

    return steps
