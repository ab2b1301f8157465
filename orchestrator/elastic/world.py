"""The membership of one generation: the worker of each rank.

Pure values. A worker keeps its id for life; its rank may change with every generation.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The members of one generation. A member's rank is its index.

    Args:
        generation: number of the generation; only grows within a run.
        members: worker ids, one per rank.

    Raises:
        ValueError: no member, or a worker named twice.
    """

    generation: int
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(f"generation {self.generation} has no members; a world needs at least one worker")
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"generation {self.generation} names a worker twice: {list(self.members)}")

    @property
    def size(self) -> int:
        return len(self.members)

    def rank_of(self, worker: str) -> int:
        """The rank of `worker`. Raises ValueError if it is not a member."""
        return self.members.index(worker)

    def __contains__(self, worker: object) -> bool:
        return worker in self.members


def union(old: World | None, new: World) -> tuple[str, ...]:
    """Members of either world: the old ones in rank order, then the new ones in rank order.

    The transfer group numbers its members in this order.
    """
    before = old.members if old is not None else ()
    return before + tuple(w for w in new.members if w not in before)
