"""Parameter groups of a model on one rank, as passed to DeepSpeed: gradient buckets (`elastic.bucket_partition`).

Dense parameters are on all ranks, an expert's on its replica set. Parameters on the same ranks that are updated alike,
and are compressed or not, are split into buckets. Fillers make their partitions even. DeepSpeed expects experts on
every rank: one that holds none of a colour has a group with only a filler there.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from orchestrator.elastic.bucket_partition import BucketCut, cut_buckets, piece_multiple
from orchestrator.elastic.state_spec import expert_of, is_compressed
from orchestrator.engine.process_groups import ProcessGroups
from orchestrator.model.base import TrainableModel, spec_of
from orchestrator.spec.communication import CommunicationSpec
from orchestrator.spec.optimizer import OF_MATRICES, OptimizerSpec

COMPRESSED, EXPERTS = "compressed", "experts_"


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose gradients are summed together over `ranks`, and whose optimizer state is partitioned over those.

    Args:
        name: shared by all buckets of parameters on the same ranks.
        params: in the order in which they lie in memory; may be empty.
        starts: the element of the bucket at which each begins.
        everything: the same with fillers between and after them, end to end.
        ranks: that have these parameters.
        is_dense: whether `ranks` are all ranks of the world.
        is_compressed: whether gradients are compressed for sending.
        update: update rule and scale of the learning rate.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    starts: tuple[int, ...]
    everything: tuple[nn.Parameter, ...]
    ranks: dist.ProcessGroup
    is_dense: bool
    is_compressed: bool
    update: tuple[str, float]

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.everything)

    def for_deepspeed(self) -> dict[str, Any]:
        group = {"name": self.name, "params": list(self.everything), "update": self.update}
        return group | ({} if self.is_dense else {"moe": True})


def is_filler(name: str) -> bool:
    return name.startswith("_filler_")


def groups_of(
    model: TrainableModel, groups: ProcessGroups, communication: CommunicationSpec, optimizer: OptimizerSpec
) -> list[ParamGroup]:
    """Groups of the parameters that are trained, in the order in which a backward pass reaches them, the last ones
    first."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    place = {id(param): index for index, (_, param) in enumerate(named)}
    cut = _Cutting(model, communication, optimizer)
    compressed = {n for n, p in named if is_compressed(spec_of(n, p), communication.compression)}
    dense = [(n, p) for n, p in named if expert_of(n) is None and n not in compressed]
    found = cut.groups("dense", dense, groups.reduction)
    if compressed:
        found += cut.groups(COMPRESSED, [(n, p) for n, p in named if n in compressed], groups.reduction)
    if model.moe_layers:
        placement = groups.placement
        for colour, replicas in enumerate(groups.replicas):
            name = group_name(colour)
            experts = [
                (n, p)
                for n, p in named
                if (e := expert_of(n)) is not None and placement.colours[placement.replica_set(e, n)] == colour
            ]
            of_colour = cut.groups(name, experts, replicas)
            for param in (p for group in of_colour for p in group.everything):
                param.allreduce = False  # type: ignore[attr-defined]
                param.group_name = name  # type: ignore[attr-defined]
            found += of_colour
    return sorted(found, key=lambda group: -min((place[id(param)] for param in group.params), default=0))


@dataclass(frozen=True)
class _Cutting:
    """Splits parameters into buckets and adds fillers to them."""

    model: TrainableModel
    communication: CommunicationSpec
    optimizer: OptimizerSpec

    def groups(self, name: str, named: list[tuple[str, nn.Parameter]], ranks: dist.ProcessGroup) -> list[ParamGroup]:
        by_update: dict[tuple[str, float], list[nn.Parameter]] = {}
        for of_param, param in named:
            by_update.setdefault(self.optimizer.settings_of(of_param, param.shape).update, []).append(param)
        num_ranks = dist.get_world_size(ranks)
        found: list[ParamGroup] = []
        for update, params in (by_update or {(self.optimizer.name, 1.0): []}).items():
            numel, is_whole = [param.numel() for param in params], update[0] in OF_MATRICES
            empty = BucketCut((), (), piece_multiple(name == COMPRESSED))
            for cut in cut_buckets(numel, num_ranks, self.communication, name == COMPRESSED, is_whole) or [empty]:
                members = tuple(params[index] for index in cut.members)
                everything = self._filled(f"{name}_{len(found)}", members, cut, num_ranks)
                found.append(
                    ParamGroup(
                        name,
                        members,
                        cut.starts,
                        everything,
                        ranks,
                        not name.startswith(EXPERTS),
                        name == COMPRESSED,
                        update,
                    )
                )
        return found

    def _filled(
        self, name: str, members: tuple[nn.Parameter, ...], cut: BucketCut, num_ranks: int
    ) -> tuple[nn.Parameter, ...]:
        """The parameters end to end, with a filler wherever there is a gap."""
        everything: list[nn.Parameter] = []
        end = 0
        for param, start in zip((*members, None), (*cut.starts, cut.piece * num_ranks), strict=True):
            if start > end:
                everything.append(self._filler(f"{name}_{len(everything)}", start - end))
            if param is not None:
                everything.append(param)
                end = start + param.numel()
        return tuple(everything)

    def _filler(self, name: str, numel: int) -> nn.Parameter:
        like = next(self.model.parameters())
        filler = nn.Parameter(torch.zeros(numel, device=like.device, dtype=like.dtype))
        self.model.register_parameter(f"_filler_{name}", filler)
        return filler


def group_name(colour: int) -> str:
    return f"{EXPERTS}{colour}"
