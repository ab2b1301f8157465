"""Parameter groups of a model on one rank, as DeepSpeed is given them: buckets of gradients (`elastic.buckets`).

Dense parameters lie on all ranks, an expert's on its replica set; what lies on the same ranks is cut into buckets. Each
ends with a filler that makes its partitions multiples of `PARTITION_MULTIPLE`. DeepSpeed wants experts on every rank:
one that holds nothing of a colour has a group of a filler alone there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.elastic.buckets import buckets, capacity
from orchestrator.elastic.layout import PARTITION_MULTIPLE
from orchestrator.engine.groups import Groups
from orchestrator.model.base import TrainableModel, expert_of


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose gradients are summed together over `ranks`, and whose optimizer state is cut over those.

    Args:
        name: of what lies on the same ranks: all its buckets have it.
        params: in the model's order; there may be none.
        filler: behind them, None if nothing is missing.
        ranks: that have these parameters.
        is_dense: they are all ranks of the world.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    filler: nn.Parameter | None
    ranks: dist.ProcessGroup
    is_dense: bool

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


def groups_of(model: TrainableModel, groups: Groups, bucket_mb: float) -> list[ParamGroup]:
    """In the order in which a backward pass reaches them, the last parameters first."""
    named = list(model.named_parameters())
    place = {id(param): index for index, (_, param) in enumerate(named)}
    dense = [p for n, p in named if expert_of(n) is None]
    found = list(_groups(model, "dense", dense, groups.reduction, bucket_mb))
    if model.moe_layers:
        colours = {e: groups.placement.colour_of(e) for e in groups.placement.experts_of(groups.rank)}
        for colour, replicas in enumerate(groups.replicas):
            name = group_name(colour)
            experts = [p for n, p in named if (e := expert_of(n)) is not None and colours[e] == colour]
            of_colour = list(_groups(model, name, experts, replicas, bucket_mb))
            for param in (p for group in of_colour for p in group.everything):
                param.allreduce = False  # type: ignore[attr-defined]
                param.group_name = name  # type: ignore[attr-defined]
            found += of_colour
    return sorted(found, key=lambda group: -place[id(group.params[0])] if group.params else 0)


def _groups(
    model: TrainableModel, name: str, params: list[nn.Parameter], ranks: dist.ProcessGroup, bucket_mb: float
) -> Iterator[ParamGroup]:
    """Buckets, each with as many elements behind it as its partitions over `ranks` lack."""
    multiple = PARTITION_MULTIPLE * dist.get_world_size(ranks)
    like = next(model.parameters())
    for number, bucket in enumerate(buckets([p.numel() for p in params], capacity(bucket_mb)) or [[]]):
        members = tuple(params[index] for index in bucket)
        missing = -sum(p.numel() for p in members) % multiple or (0 if members else multiple)
        filler = None
        if missing:
            filler = nn.Parameter(torch.zeros(missing, device=like.device, dtype=like.dtype))
            model.register_parameter(f"_filler_{name}_{number}", filler)
        yield ParamGroup(name, members, filler, ranks, name == "dense")


def group_name(colour: int) -> str:
    return f"experts_{colour}"
