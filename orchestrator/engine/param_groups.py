"""Parameter groups of a model on one rank, as passed to DeepSpeed: gradient buckets (`elastic.bucket_partition`).

Dense parameters are on all ranks, an expert's on its replica set. Parameters on the same ranks that are compressed, or
are not, are split into buckets. Each ends with a filler that makes its partitions even. DeepSpeed expects experts on
every rank: one that holds none of a colour has a group with only a filler there.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.elastic.bucket_partition import buckets, piece_multiple
from orchestrator.elastic.state_spec import is_compressed
from orchestrator.engine.process_groups import ProcessGroups
from orchestrator.model.base import TrainableModel, expert_of, spec_of
from orchestrator.spec.communication import CommunicationSpec

COMPRESSED, EXPERTS = "compressed", "experts_"


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose gradients are summed together over `ranks`, and whose optimizer state is partitioned over those.

    Args:
        name: shared by all buckets of parameters on the same ranks.
        params: in the model's order; may be empty.
        filler: padding after them, None if none is needed.
        ranks: that have these parameters.
        is_dense: whether `ranks` are all ranks of the world.
        is_compressed: whether gradients are compressed for sending.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    filler: nn.Parameter | None
    ranks: dist.ProcessGroup
    is_dense: bool
    is_compressed: bool

    @property
    def everything(self) -> list[nn.Parameter]:
        return [*self.params, self.filler] if self.filler is not None else list(self.params)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.everything)

    def for_deepspeed(self) -> dict[str, Any]:
        return {"name": self.name, "params": self.everything} | ({} if self.is_dense else {"moe": True})


def is_filler(name: str) -> bool:
    return name.startswith("_filler_")


def groups_of(model: TrainableModel, groups: ProcessGroups, communication: CommunicationSpec) -> list[ParamGroup]:
    """Groups in the order in which a backward pass reaches them, the last parameters first."""
    named = list(model.named_parameters())
    place = {id(param): index for index, (_, param) in enumerate(named)}
    compressed = {n for n, p in named if is_compressed(spec_of(n, p), communication.compression)}
    dense = [p for n, p in named if expert_of(n) is None and n not in compressed]
    cut = _Cutting(model, communication)
    found = cut.groups("dense", dense, groups.reduction)
    if compressed:
        found += cut.groups(COMPRESSED, [p for n, p in named if n in compressed], groups.reduction)
    if model.moe_layers:
        colours = {e: groups.placement.colour_of(e) for e in groups.placement.experts_of(groups.rank)}
        for colour, replicas in enumerate(groups.replicas):
            name = group_name(colour)
            experts = [p for n, p in named if (e := expert_of(n)) is not None and colours[e] == colour]
            of_colour = cut.groups(name, experts, replicas)
            for param in (p for group in of_colour for p in group.everything):
                param.allreduce = False  # type: ignore[attr-defined]
                param.group_name = name  # type: ignore[attr-defined]
            found += of_colour
    return sorted(found, key=lambda group: -place[id(group.params[0])] if group.params else 0)


@dataclass(frozen=True)
class _Cutting:
    """Splits parameters into buckets and adds fillers to them."""

    model: TrainableModel
    communication: CommunicationSpec

    def groups(self, name: str, params: list[nn.Parameter], ranks: dist.ProcessGroup) -> list[ParamGroup]:
        num_ranks = dist.get_world_size(ranks)
        multiple = piece_multiple(name == COMPRESSED) * num_ranks
        found = []
        for number, bucket in enumerate(buckets([p.numel() for p in params], num_ranks, self.communication) or [[]]):
            members = tuple(params[index] for index in bucket)
            missing = -sum(p.numel() for p in members) % multiple or (0 if members else multiple)
            filler = self._filler(f"{name}_{number}", missing) if missing else None
            found.append(ParamGroup(name, members, filler, ranks, not name.startswith(EXPERTS), name == COMPRESSED))
        return found

    def _filler(self, name: str, numel: int) -> nn.Parameter:
        like = next(self.model.parameters())
        filler = nn.Parameter(torch.zeros(numel, device=like.device, dtype=like.dtype))
        self.model.register_parameter(f"_filler_{name}", filler)
        return filler


def group_name(colour: int) -> str:
    return f"{EXPERTS}{colour}"
