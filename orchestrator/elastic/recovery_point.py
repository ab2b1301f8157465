"""Recovery points: the newest step for which live workers hold every shard.

After a step each rank's shard is in its own worker's memory and, once protected, in its buddy's too. A *recovery point*
is a step for which reachable workers still hold every rank's shard: training can continue from it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.elastic.expert_placement import ExpertPlacement, Holders
from orchestrator.elastic.state_layout import StateLayout
from orchestrator.elastic.state_spec import Sharing
from orchestrator.elastic.world import World


@dataclass(frozen=True)
class Holding:
    """A rank's whole shard after `step`, in the layout of `generation`."""

    generation: int
    step: int
    rank: int


@dataclass(frozen=True)
class RecoveryPoint:
    """A complete training state in the memory of workers.

    Args:
        generation: the generation whose layout the shards have.
        step: the last finished step in it.
        holders: by rank of that generation, the worker that holds the rank's shard.
    """

    generation: int
    step: int
    holders: tuple[str, ...]


def find_recovery_point(worlds: Iterable[World], held: Mapping[str, Collection[Holding]]) -> RecoveryPoint | None:
    """The newest state of which reachable workers hold every rank's shard; None if there is none.

    A rank's own worker is preferred, since nothing is transferred then. In a world of several ranks at least one must
    be held by its own worker: snapshots for buddies omit what every rank has.

    Args:
        worlds: generations that states may belong to.
        held: shards that each reachable worker holds.
    """
    found: list[RecoveryPoint] = []
    for world in worlds:
        steps = {h.step for holdings in held.values() for h in holdings if h.generation == world.generation}
        for step in steps:
            holders = [_holder(world, step, rank, held) for rank in range(world.size)]
            complete = tuple(holder for holder in holders if holder is not None)
            if len(complete) == world.size and _ranks_with_all(world, complete):
                found.append(RecoveryPoint(world.generation, step, complete))
    return max(found, key=lambda point: (point.step, point.generation), default=None)


def _holder(world: World, step: int, rank: int, held: Mapping[str, Collection[Holding]]) -> str | None:
    wanted = Holding(world.generation, step, rank)
    own = world.members[rank]
    if wanted in held.get(own, ()):
        return own
    return next((worker for worker, holdings in sorted(held.items()) if wanted in holdings), None)


def _ranks_with_all(world: World, holders: Sequence[str]) -> list[int]:
    """Ranks whose holders have what every rank of the world has: those held by their own workers, and a lone rank."""
    return [rank for rank, holder in enumerate(holders) if holder == world.members[rank] or world.size == 1]


def world_of(generation: int, holders: Sequence[str]) -> World:
    """The holders of a recovery point as a world, in the order of the ranks that they stand for."""
    return World(generation, tuple(dict.fromkeys(holders)))


def layout_at_recovery_point(layout: StateLayout, holders: Sequence[str]) -> StateLayout:
    """The layout of the same state on the holders of a recovery point.

    A worker that holds another rank's snapshot has that rank's ranges besides its own; of a partial tensor, the sum of
    both. Snapshots for buddies omit what every rank of the world has, so for it only ranks held by their own workers
    count, or the only rank.

    Raises:
        ValueError: no rank of several is held by its own worker.
    """
    world = world_of(layout.world.generation, holders)
    rank_of = np.array([world.rank_of(holder) for holder in holders], dtype=np.int64)
    own = _ranks_with_all(layout.world, holders)
    if not own:
        raise ValueError(f"{list(holders)} hold only others' shards of {list(layout.world.members)}")
    sets = []
    for ranks in layout.holder_sets:
        counted = own if len(ranks) == layout.world.size else ranks
        sets.append(tuple(sorted({int(rank_of[rank]) for rank in counted})))
    partial = layout.sharing == Sharing.PARTIAL  # each rank has its own part
    holder_set = np.where(partial, len(sets), layout.holder_set)
    if partial.any():
        sets.append(tuple(sorted({int(rank) for rank in rank_of})))
    shards = layout.shards.copy()
    shards[:, 3] = rank_of[shards[:, 3]]
    return replace(layout, world=world, holder_sets=tuple(sets), holder_set=holder_set, shards=shards)


def placement_at_recovery_point(placement: ExpertPlacement, holders: Sequence[str]) -> ExpertPlacement:
    """The holders (as ranks of `world_of`) of each expert, in their own shard or in another rank's snapshot."""
    world = world_of(0, holders)
    rank_of = [world.rank_of(holder) for holder in holders]

    def there(holders: Holders) -> Holders:
        return tuple(tuple(sorted({rank_of[rank] for rank in ranks})) for ranks in holders)

    layers = tuple((layer, there(held)) for layer, held in placement.layers)
    return ExpertPlacement(placement.num_experts, world.size, there(placement.holders), layers)
