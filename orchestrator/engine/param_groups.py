"""Parameter groups of a model on one rank, as DeepSpeed is given them: the same list on every rank.

Dense, then one per colour of the placement. Each ends with a filler that makes its partitions multiples of
`PARTITION_MULTIPLE`; a rank that holds nothing of a colour has only a filler there, since DeepSpeed wants every rank to
have every group.
"""

from typing import Any

import torch
from torch import nn

from orchestrator.elastic.layout import PARTITION_MULTIPLE
from orchestrator.engine.groups import Groups
from orchestrator.model.base import TrainableModel, expert_of


def is_filler(name: str) -> bool:
    return name.startswith("_filler_")


def groups_of(model: TrainableModel, groups: Groups) -> list[dict[str, Any]]:
    """Dense parameters, then one group per colour of the placement; the order of a group is the model's."""
    named = list(model.named_parameters())
    dense = [p for n, p in named if expert_of(n) is None]
    result: list[dict[str, Any]] = [{"name": "dense", "params": _filled(model, "dense", dense, groups.world)}]
    if not model.moe_layers:
        return result
    colours = {e: groups.placement.colour_of(e) for e in groups.placement.experts_of(groups.rank)}
    for colour, replicas in enumerate(groups.replicas):
        name = group_name(colour)
        experts = [p for n, p in named if (e := expert_of(n)) is not None and colours[e] == colour]
        params = _filled(model, name, experts, replicas)
        for param in params:
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = name  # type: ignore[attr-defined]
        result.append({"name": name, "params": params, "moe": True})
    return result


def _filled(
    model: TrainableModel, group: str, params: list[nn.Parameter], ranks: torch.distributed.ProcessGroup
) -> list[nn.Parameter]:
    """A group's parameters and, behind them, as many elements as its partitions over `ranks` lack."""
    multiple = PARTITION_MULTIPLE * torch.distributed.get_world_size(ranks)
    missing = -sum(p.numel() for p in params) % multiple or (0 if params else multiple)
    if not missing:
        return params
    like = next(model.parameters())
    filler = nn.Parameter(torch.zeros(missing, device=like.device, dtype=like.dtype))
    model.register_parameter(f"_filler_{group}", filler)
    return [*params, filler]


def group_name(colour: int) -> str:
    return f"experts_{colour}"
