"""Layouts of training states that no model is needed for."""

from collections.abc import Iterable, Sequence

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import ParamSpec, StateTensor
from orchestrator.elastic.world import World
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.optimizer import OptimizerSpec
from orchestrator.spec.train import TrainSpec

PLAIN = CommunicationSpec()
Buffers = Iterable[tuple[str, tuple[int, ...]]]


def state_of(
    params: Sequence[ParamSpec],
    mixed: bool,
    buffers: Buffers,
    communication: CommunicationSpec = PLAIN,
    optimizer: OptimizerSpec | None = None,
) -> dict[str, StateTensor]:
    """The inventory of a job in bf16 or fp32."""
    train = TrainSpec(precision="bf16" if mixed else "fp32", optimizer=optimizer or OptimizerSpec())
    job = JobSpec(name="layouts").model_copy(update={"train": train, "communication": communication})
    return inventory(params, job, buffers)


def layout_of_state(
    params: Sequence[ParamSpec],
    placement: ExpertPlacement,
    world: World,
    mixed: bool,
    buffers: Buffers,
    communication: CommunicationSpec = PLAIN,
    optimizer: OptimizerSpec | None = None,
) -> StateLayout:
    tensors = state_of(params, mixed, buffers, communication, optimizer)
    return training_layout(tensors, placement, world, communication)
