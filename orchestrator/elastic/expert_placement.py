"""Placement of experts on ranks.

Two rules make a placement *balanced*. With at least as many experts as ranks, every expert is on one rank and the
ranks' expert counts differ by at most one. With more ranks than experts, every rank holds one expert and the sizes of
the experts' replica sets differ by at most one. Both are one problem: deal the items of the longer side (experts or
ranks) into the bins of the shorter side so that the bins' sizes differ by at most one.

Replicas of an expert are spread over different nodes where possible, so that a node has as many experts as it can: a
token is sent to another node only for experts that its own lacks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Self

from orchestrator.elastic.expert_dealing import deal
from orchestrator.elastic.state_spec import layer_of
from orchestrator.elastic.world import World

ReplicaSet = tuple[int, ...]
Holders = tuple[ReplicaSet, ...]
"""By expert of a layer, the ranks that hold it: at least one, in ascending order."""


@dataclass(frozen=True)
class ExpertPlacement:
    """The holders of every expert in a world of `world_size` ranks. A rank may hold none.

    Layers are named as their parameters are, up to `.experts.` (`elastic.state_spec.layer_of`).

    Args:
        num_experts: routed experts per layer.
        holders: of the experts of all layers that `layers` doesn't name.
        layers: (layer, holders) of layers with a placement of their own, by name.

    Raises:
        ValueError: holders that don't match the two numbers, an expert without a holder, or a layer named twice.
    """

    num_experts: int
    world_size: int
    holders: Holders
    layers: tuple[tuple[str, Holders], ...] = ()

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.world_size < 1:
            raise ValueError(f"{self.num_experts} experts on {self.world_size} ranks; a placement needs one of each")
        if len(self._by_layer) < len(self.layers):
            raise ValueError(f"of {[layer for layer, _ in self.layers]} a layer is named twice")
        for holders in (self.holders, *self._by_layer.values()):
            self._check(holders)

    def _check(self, holders: Holders) -> None:
        if len(holders) != self.num_experts:
            raise ValueError(f"holders of {len(holders)} experts given; there are {self.num_experts}")
        for expert, ranks in enumerate(holders):
            if not ranks:
                raise ValueError(f"expert {expert} has no holder; every expert needs at least one rank")
            if list(ranks) != sorted(set(ranks)) or ranks[0] < 0 or ranks[-1] >= self.world_size:
                raise ValueError(
                    f"expert {expert} is held by {ranks}; holders are distinct ascending ranks below {self.world_size}"
                )

    @classmethod
    def balanced(cls, num_experts: int, world_size: int, nodes: Sequence[str] = ()) -> Self:
        """Contiguous blocks: of experts per rank, or of ranks per expert where ranks outnumber experts. In the latter
        case, if the ranks run on several nodes, experts are assigned round-robin, node by node: no node gets an expert
        twice before it has all of them.

        Args:
            nodes: by rank, the node that it runs on; empty if unknown.
        """
        if num_experts < 1 or world_size < 1:
            raise ValueError(f"{num_experts} experts on {world_size} ranks; a placement needs one of each")
        if num_experts < world_size and len(set(nodes)) > 1:
            turns = sorted(range(world_size), key=lambda rank: nodes.index(nodes[rank]))
            return cls._from_bins(num_experts, world_size, [turns.index(r) % num_experts for r in range(world_size)])
        num_items, num_bins = max(num_experts, world_size), min(num_experts, world_size)
        size, larger = divmod(num_items, num_bins)
        bins = [b for b in range(num_bins) for _ in range(size + (b < larger))]
        return cls._from_bins(num_experts, world_size, bins)

    @classmethod
    def rebalanced(cls, previous: "ExpertPlacement", old: World, new: World, nodes: Sequence[str] = ()) -> Self:
        """A balanced placement on `new` that gives workers the fewest experts that they lacked in `old`: each time one
        that is scarcest on its node.

        Deterministic. Workers are identified by id, so a survivor keeps its experts whatever its new rank is.

        Args:
            nodes: by rank of `new`, the node that it runs on; empty if unknown.

        Raises:
            ValueError: `previous` is not a placement on `old`.
        """
        if previous.world_size != old.size:
            raise ValueError(f"the previous placement is for {previous.world_size} ranks; its world has {old.size}")
        holders = cls._dealt(previous.holders, old, new, nodes)
        layers = tuple((layer, cls._dealt(held, old, new, nodes)) for layer, held in previous.layers)
        return cls(previous.num_experts, new.size, holders, layers)

    @classmethod
    def _dealt(cls, previous: Holders, old: World, new: World, nodes: Sequence[str]) -> Holders:
        """The balanced holders of a layer's experts on `new`."""
        num_experts = len(previous)
        new_rank = {worker: rank for rank, worker in enumerate(new.members)}
        survivors = [tuple(new_rank[w] for w in (old.members[r] for r in ranks) if w in new_rank) for ranks in previous]
        if num_experts >= new.size:
            bins = deal(survivors, new.size)
        else:
            held: list[list[int]] = [[] for _ in range(new.size)]
            for expert, ranks in enumerate(survivors):
                for rank in ranks:
                    held[rank].append(expert)
            bins = deal(held, num_experts, nodes)
        return cls._from_bins(num_experts, new.size, bins).holders

    @classmethod
    def _from_bins(cls, num_experts: int, world_size: int, bins: Sequence[int]) -> Self:
        """`bins[i]`: the rank of expert i, or the expert of rank i where ranks outnumber experts."""
        if num_experts >= world_size:
            return cls(num_experts, world_size, tuple((rank,) for rank in bins))
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        for rank, expert in enumerate(bins):
            holders[expert].append(rank)
        return cls(num_experts, world_size, tuple(tuple(ranks) for ranks in holders))

    @cached_property
    def _by_layer(self) -> dict[str, Holders]:
        return dict(self.layers)

    def holders_of(self, layer: str) -> Holders:
        """Holders of a layer's experts."""
        return self._by_layer.get(layer, self.holders)

    def replica_set(self, expert: int, param: str) -> ReplicaSet:
        """The ranks that hold an expert, one of whose parameters is named."""
        return (self.holders_of(layer_of(param)) if self.layers else self.holders)[expert]

    def experts_of(self, rank: int, layer: str = "") -> tuple[int, ...]:
        """The experts of a layer that `rank` holds, ascending; may be empty."""
        return tuple(e for e, ranks in enumerate(self.holders_of(layer)) if rank in ranks)

    def destinations(self, nodes: Sequence[str] = (), layer: str = "") -> list[tuple[int, ...]]:
        """[sender][expert]: the rank that a sender's tokens for an expert go to. The sender itself if it holds the
        expert, else a holder on its node, else any holder. Senders are spread evenly over the holders that they may
        choose among.

        Args:
            nodes: by rank, the node that it runs on; empty if unknown, in which case all count as near each other.
        """
        homes = tuple(nodes) or ("",) * self.world_size
        return list(zip(*(_receivers(ranks, homes) for ranks in self.holders_of(layer)), strict=True))

    def shares(self, nodes: Sequence[str] = (), layer: str = "") -> list[tuple[float, ...]]:
        """[expert][rank]: the share of an expert's tokens that a rank computes, where ranks send equally many.

        Args:
            nodes: by rank, the node that it runs on; empty if unknown.
        """
        ranks = range(self.world_size)
        receivers = zip(*self.destinations(nodes, layer), strict=True)
        return [tuple(to.count(rank) / self.world_size for rank in ranks) for to in receivers]

    def groups(self) -> tuple[tuple[ReplicaSet, ...], ...]:
        """The distinct replica sets by colour: sets of one colour are disjoint, and sorted.

        The engine makes one optimizer group per colour, so every rank has equally many groups, with any experts.
        A balanced placement has one colour.
        """
        colours: list[list[ReplicaSet]] = []
        taken: list[set[int]] = []
        for replicas in sorted({ranks for holders in (self.holders, *self._by_layer.values()) for ranks in holders}):
            free = (c for c, ranks in enumerate(taken) if ranks.isdisjoint(replicas))
            colour = next(free, len(colours))
            if colour == len(colours):
                colours.append([])
                taken.append(set())
            colours[colour].append(replicas)
            taken[colour].update(replicas)
        return tuple(tuple(sets) for sets in colours)

    @cached_property
    def colours(self) -> dict[ReplicaSet, int]:
        """By replica set, the index in `groups()` of its colour."""
        return {replicas: colour for colour, sets in enumerate(self.groups()) for replicas in sets}


def groups_open(sizes: Iterable[int], asked: int, top_k: int) -> int:
    """Number of groups of experts, of these sizes, that a token may visit: `asked`, raised until any such groups hold
    `top_k` experts. All groups if that is never the case."""
    ascending = sorted(sizes)
    held = list(accumulate(ascending))
    enough = next((number for number, experts in enumerate(held, 1) if experts >= top_k), len(held))
    return min(max(asked, enough), len(held))


def _receivers(holders: ReplicaSet, nodes: Sequence[str]) -> list[int]:
    """By sender, the holder of an expert that it sends to. Senders limited to their node are assigned first; each takes
    the holder with the fewest senders so far, a holder counting as its own sender."""
    if len(holders) == 1:
        return list(holders) * len(nodes)
    near: dict[str, list[int]] = {}
    for holder in holders:
        near.setdefault(nodes[holder], []).append(holder)
    receivers = [rank if rank in holders else -1 for rank in range(len(nodes))]
    senders = Counter(holders)
    others = [rank for rank, to in enumerate(receivers) if to < 0]
    for rank in sorted(others, key=lambda rank: nodes[rank] not in near):
        receivers[rank] = min(near.get(nodes[rank], holders), key=senders.__getitem__)
        senders[receivers[rank]] += 1
    return receivers
