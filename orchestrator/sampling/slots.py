"""Which rank runs which slots of the global batch.

The global batch is cut into the same slots at every world size; a rank takes a contiguous block of them, so
that results joined in rank order are in slot order.
"""


def slots_of(rank: int, world_size: int, num_slots: int) -> range:
    """The slots of `rank`: balanced contiguous blocks, the first ranks have one more. May be empty.

    Raises:
        ValueError: a rank outside the world, an empty world, or a negative number of slots.
    """
    _check(world_size, num_slots)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside a world of {world_size}; ranks run from 0 to {world_size - 1}")
    share, extra = divmod(num_slots, world_size)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def max_slots(world_size: int, num_slots: int) -> int:
    """Forward passes that every rank runs: a rank with fewer slots runs the rest with no rows, or peers deadlock."""
    _check(world_size, num_slots)
    return -(-num_slots // world_size)


def _check(world_size: int, num_slots: int) -> None:
    if world_size < 1 or num_slots < 0:
        raise ValueError(f"{num_slots} slots over {world_size} ranks: needs at least 1 rank and no fewer than 0 slots")
