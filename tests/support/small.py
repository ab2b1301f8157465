"""A small model, its data, and engines around it, for tests that need real ranks. All on the process's device."""

from typing import Any

import torch
from torch._C._distributed_c10d import Store

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.world import World
from orchestrator.engine.base import Engine, StepOutcome
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import ProcessGroups, connect
from orchestrator.model.factory import catalogue
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.task import Batch
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.sampling.micro_batches import max_micro_batches, micro_batches_of
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import OptimizerSpec, TrainSpec
from tests.support import devices
from tests.support.layouts import layout_of_state
from tests.support.reference_engine import ReferenceEngine

VOCAB, LENGTH, NUM_SLOTS, ROWS = 128, 32, 6, 2


def model_spec(num_experts: int = 4, num_layers: int = 3, recompute: str = "none") -> ModelSpec:
    return ModelSpec(
        hidden_size=32,
        num_hidden_layers=num_layers,
        gradient_checkpointing=recompute,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        n_routed_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )


def train_spec(
    precision: str = "fp32",
    zero_stage: int = 1,
    betas: tuple[float, float] = (0.9, 0.95),
    determinism: str = "fast",
) -> TrainSpec:
    return TrainSpec(
        max_steps=100,
        lr=3e-3,
        global_batch_size=NUM_SLOTS * ROWS,
        micro_batch_size=ROWS,
        sequence_length=LENGTH,
        precision=precision,
        zero_stage=zero_stage,
        optimizer=OptimizerSpec(betas=betas),
        determinism=determinism,
    )


def build(
    kind: str,
    store: Store,
    prefix: str,
    rank: int,
    placement: ExpertPlacement,
    train: TrainSpec,
    seed: int = 0,
    nodes: tuple[str, ...] = (),
    spec: ModelSpec | None = None,
    **communication: Any,
) -> tuple[ProcessGroups, MoELanguageModel, Engine]:
    """Groups, model and engine (`deepspeed` or `reference`) of one rank, with weights made from the seed.

    Args:
        spec: of the model, if not `model_spec` with the placement's experts.
    """
    groups = connect(store, prefix, rank, placement, devices.backend(), timeout_s=60)
    wanted = CommunicationSpec(**communication)
    home = ExpertParallelContext(placement, rank, groups.exchange, wanted.tokens, nodes=nodes, is_exact=train.is_exact)
    with devices.device():
        model = MoELanguageModel(spec or model_spec(placement.num_experts), VOCAB, home)
    engine: Engine
    if kind == "reference":
        model.init_weights(seed)
        engine = ReferenceEngine(model, train, groups)
    else:
        engine = DeepSpeedEngineAdapter(model, train, groups, devices.device(), wanted)
        model.init_weights(seed)
    engine.on_weights_initialized()
    return groups, model, engine


def micro_batch(step: int, number: int) -> Batch:
    """Rows of a micro-batch: a learnable pattern that depends on (step, number) alone."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = (torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator) // 8 * 8).to(devices.device())
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def empty() -> Batch:
    nothing = torch.zeros(0, LENGTH, dtype=torch.int64, device=devices.device())
    return {"inputs": nothing, "targets": nothing}


def train_steps(engine: Engine, groups: ProcessGroups, steps: range, lr: float = 3e-3) -> list[float]:
    """Losses (mean per token) of some steps, summed over ranks in micro-batch order."""
    losses = []
    for step in steps:
        loss, outcome = train_step(engine, groups, step, lr)
        assert outcome.applied
        losses.append(loss)
    return losses


def train_step(
    engine: Engine, groups: ProcessGroups, step: int, lr: float, keep_gradients: bool = False
) -> tuple[float, StepOutcome]:
    """Loss (mean per token) of a step, summed over ranks in micro-batch order, and what the update did."""
    tokens = NUM_SLOTS * ROWS * LENGTH
    sums = torch.zeros(NUM_SLOTS, dtype=torch.float64, device=devices.device())
    mine = list(micro_batches_of(groups.rank, groups.world_size, NUM_SLOTS))
    num_micro_batches = max_micro_batches(groups.world_size, NUM_SLOTS)
    for index in range(num_micro_batches):
        batch = micro_batch(step, mine[index]) if index < len(mine) else empty()
        loss, _ = engine.accumulate(batch, tokens, index == num_micro_batches - 1)
        if index < len(mine):
            sums[mine[index]] = float(loss.total)
    outcome = engine.step(lr, keep_gradients=keep_gradients)
    torch.distributed.all_reduce(sums)
    return float(sums.sum()) / tokens, outcome


def layout_of(placement: ExpertPlacement, precision: str, **communication: Any) -> StateLayout:
    world = World(0, tuple(f"w{r}" for r in range(placement.world_size)))
    params, buffers = catalogue(model_spec(placement.num_experts), VOCAB)
    spec = CommunicationSpec(**communication)
    return layout_of_state(params, placement, world, precision == "bf16", buffers, spec)
