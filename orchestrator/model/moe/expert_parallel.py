"""Expert parallelism as one rank sees it: the placement of experts, and what is sent where."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch.distributed as dist

from orchestrator.comm.tokens.activation_codec import Wire
from orchestrator.elastic.expert_placement import ExpertPlacement, groups_open
from orchestrator.model.moe.routing.limit import Limit, OneOfFamily


@dataclass(frozen=True)
class ExpertParallelContext:
    """The placement of experts, seen from one rank.

    Args:
        placement: which ranks hold which expert.
        rank: this rank.
        group: the world; None for a world of one.
        wire: encoding of tokens and results in transit.
        ranks_per_token: ranks whose experts a token may choose among, None for all; raised until they hold enough.
        nodes: by rank, the node that it runs on; empty if unknown.
        nodes_per_token: the same for nodes.
        is_exact: outputs and gradients have the same bits for the same rows wherever the experts are.
        layer: the layer whose experts these are, as `elastic.state_spec.layer_of` names it.
        keeps_saliency: whether routers keep how much each expert adds (`model.moe.routing.saliency`).
        families: by layer, the family of each expert, of which a token may visit one member; empty: there are none.
    """

    placement: ExpertPlacement
    rank: int
    group: dist.ProcessGroup | None
    wire: Wire = "native"
    ranks_per_token: int | None = None
    nodes: tuple[str, ...] = ()
    nodes_per_token: int | None = None
    is_exact: bool = False
    layer: str = ""
    keeps_saliency: bool = False
    families: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of_layer(self, layer: str) -> "ExpertParallelContext":
        """The placement of a layer; this one, unless the layer has one or families of its own."""
        is_own = layer in self.families or self.placement.holders_of(layer) is not self.placement.holders
        return replace(self, layer=layer) if is_own else self

    @property
    def local_experts(self) -> tuple[int, ...]:
        return self.placement.experts_of(self.rank, self.layer)

    @cached_property
    def destinations(self) -> tuple[int, ...]:
        """By expert, the rank that computes this rank's tokens for it: itself, else one on its node, if one has it."""
        return self.placement.destinations(self.nodes, self.layer)[self.rank]

    @cached_property
    def is_far_W(self) -> tuple[bool, ...]:
        """By rank, whether it is known to run on another node."""
        return tuple(node != self.nodes[self.rank] for node in self.nodes)

    def limits(self, top_k: int) -> list[Limit | OneOfFamily]:
        """Limits on the choice of a token that visits `top_k` experts, nodes first."""
        ranks = self.destinations
        limits: list[Limit | OneOfFamily] = []
        if self.nodes_per_token is not None and self.nodes:
            limits.append(_limit([self.nodes[rank] for rank in ranks], self.nodes_per_token, top_k))
        if self.ranks_per_token is not None:
            limits.append(_limit(ranks, self.ranks_per_token, top_k))
        if self.layer in self.families:
            limits.append(OneOfFamily(self.families[self.layer]))
        return limits


def _limit(groups: Sequence[int | str], asked: int, top_k: int) -> Limit:
    top = groups_open(Counter(groups).values(), asked, top_k)
    return Limit(groups, top, best=-(-top_k // top))
