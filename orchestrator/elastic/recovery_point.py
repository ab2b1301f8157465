"""Complete states that lie about in the memory of workers, and the newest of them.

After a step each rank's shard lies in its own worker's memory, and once protected in its buddy's too. A *cut* is a step
after which somebody reachable still has every rank's shard: what training can go on from.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.state_layout import Kind, StateLayout
from orchestrator.elastic.world import World


@dataclass(frozen=True)
class Holding:
    """A rank's whole shard after `step`, as `generation` had cut the state into shards."""

    generation: int
    step: int
    rank: int


@dataclass(frozen=True)
class RecoveryPoint:
    """A complete state.

    Args:
        generation: whose layout the shards have.
        step: the last finished step in it.
        holders: by rank of that generation, the worker that holds the rank's shard.
    """

    generation: int
    step: int
    holders: tuple[str, ...]


def find_recovery_point(worlds: Iterable[World], held: Mapping[str, Collection[Holding]]) -> RecoveryPoint | None:
    """The newest state of which every rank's shard is held by somebody; None if there is none.

    A rank's own worker comes first, since nothing needs to move then. At least one rank must be held by its own worker:
    snapshots leave out what every rank of a world has.

    Args:
        worlds: generations that states may be of.
        held: what each reachable worker holds.
    """
    found: list[RecoveryPoint] = []
    for world in worlds:
        steps = {h.step for holdings in held.values() for h in holdings if h.generation == world.generation}
        for step in steps:
            holders = [_holder(world, step, rank, held) for rank in range(world.size)]
            complete = tuple(holder for holder in holders if holder is not None)
            own = any(holder == member for holder, member in zip(holders, world.members, strict=True))
            if len(complete) == world.size and own:
                found.append(RecoveryPoint(world.generation, step, complete))
    return max(found, key=lambda point: (point.step, point.generation), default=None)


def _holder(world: World, step: int, rank: int, held: Mapping[str, Collection[Holding]]) -> str | None:
    wanted = Holding(world.generation, step, rank)
    own = world.members[rank]
    if wanted in held.get(own, ()):
        return own
    return next((worker for worker, holdings in sorted(held.items()) if wanted in holdings), None)


def world_of(generation: int, holders: Sequence[str]) -> World:
    """The holders of a cut as a world, in the order of the ranks that they stand for."""
    return World(generation, tuple(dict.fromkeys(holders)))


def layout_at_recovery_point(layout: StateLayout, holders: Sequence[str]) -> StateLayout:
    """The same state as it lies with the holders of a cut.

    A worker that holds another rank's snapshot has that rank's ranges beside its own; of a partial tensor the sum of
    both. What every rank of the world has is in no snapshot of another's, so only ranks held by their own workers count
    for it.

    Raises:
        ValueError: no rank is held by its own worker.
    """
    world = world_of(layout.world.generation, holders)
    rank_of = np.array([world.rank_of(holder) for holder in holders], dtype=np.int64)
    own = [rank for rank, holder in enumerate(holders) if holder == layout.world.members[rank]]
    if not own:
        raise ValueError(f"{list(holders)} hold only others' shards of {list(layout.world.members)}")
    sets = []
    for ranks in layout.holder_sets:
        counted = own if len(ranks) == layout.world.size else ranks
        sets.append(tuple(sorted({int(rank_of[rank]) for rank in counted})))
    partial = layout.kind == Kind.PARTIAL  # each rank has a part of its own
    holder_set = np.where(partial, len(sets), layout.holder_set)
    if partial.any():
        sets.append(tuple(sorted({int(rank) for rank in rank_of})))
    shards = layout.shards.copy()
    shards[:, 3] = rank_of[shards[:, 3]]
    return StateLayout(
        world=world,
        names=layout.names,
        numel=layout.numel,
        itemsize=layout.itemsize,
        kind=layout.kind,
        holder_sets=tuple(sets),
        holder_set=holder_set,
        shards=shards,
    )


def placement_at_recovery_point(placement: ExpertPlacement, holders: Sequence[str]) -> ExpertPlacement:
    """Which of the holders (as ranks of `world_of`) have each expert, in their own shard or in another's snapshot."""
    world = world_of(0, holders)
    rank_of = [world.rank_of(holder) for holder in holders]
    return ExpertPlacement(
        placement.num_experts,
        world.size,
        tuple(tuple(sorted({rank_of[rank] for rank in ranks})) for ranks in placement.holders),
    )
