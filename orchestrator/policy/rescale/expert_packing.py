"""Placement of a layer's experts by their loads: cold experts packed, hot ones replicated, in the spirit of EPLB
(DeepSeek-AI, https://github.com/deepseek-ai/eplb). Pure.

A layer takes as long as its busiest rank, so the aim is the lowest *peak*: the largest load of a rank over the mean.
Experts begin where they are, and change places until the peak is near 1: an expert that stays needs no transfer. If
that is not enough, the expert with the highest load per copy gets more copies.

Copies of an expert are on a *block*: the ranks, halved again and again. Blocks nest, so the optimizer needs one group
per level (`ExpertPlacement.groups`). Each rank has room for equally many experts per layer.

Shape legend: E = experts, W = ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.expert_placement import ExpertPlacement, Holders, ReplicaSet

EVEN = 1.03  # a peak that isn't worth another exchange of experts
PER_COPY = 0.02  # of the peak, by which each further copy has to lower it: its gradients are sent

Level = tuple[ReplicaSet, ...]


@dataclass(frozen=True)
class Ranks:
    """Ranks that experts are packed on.

    Args:
        levels: blocks by level: single ranks, pairs, and so on to all of them.
        room: experts of a layer that a rank may have.
        share_of: by block, the share of an expert's tokens that each rank computes.
        nodes: by rank, the node that it runs on; empty if unknown.
    """

    levels: tuple[Level, ...]
    room: int
    share_of: Mapping[ReplicaSet, NDArray[np.float64]]
    nodes: tuple[str, ...] = ()

    @classmethod
    def of(cls, world_size: int, num_experts: int, redundant: int, nodes: Sequence[str] = ()) -> "Ranks":
        """Ranks with room for all experts of a layer and `redundant` copies."""
        levels = _levels(world_size)
        blocks = tuple({block for level in levels for block in level})
        shares = ExpertPlacement(len(blocks), world_size, blocks).shares(nodes)
        share_of = {block: np.array(share) for block, share in zip(blocks, shares, strict=True)}
        return cls(levels, -(-(num_experts + redundant) // world_size), share_of, tuple(nodes))

    @property
    def size(self) -> int:
        return len(self.levels[0])


def pack(load_E: NDArray[np.float64], present: Holders, ranks: Ranks, redundant: int) -> Holders:
    """Holders of a layer's experts with a low peak; the present ones if none is found that is lower.

    Args:
        load_E: tokens of each expert.
        redundant: copies at most, besides one of each expert.
    """
    best, lowest = present, peak(load_E, present, ranks)
    if lowest <= EVEN:
        return best
    level_E, num_copies = np.zeros(len(load_E), dtype=np.int64), _copies(present)
    while True:
        for start in (present, ()):
            packing = _Packing(load_E, ranks)
            if not packing.fill(level_E, start):
                continue
            packing.exchange()
            copies = _copies(packing.holders)
            if copies <= redundant and packing.peak < lowest * (1 - PER_COPY * max(copies - num_copies, 1)):
                best, lowest, num_copies = packing.holders, packing.peak, copies
            if lowest <= EVEN:
                return best
        raised = _raised(load_E, level_E, ranks)
        if raised is None or sum(len(ranks.levels[level][0]) - 1 for level in raised) > redundant:
            return best
        level_E = raised


def peak(load_E: NDArray[np.float64], holders: Holders, ranks: Ranks) -> float:
    """Load of the busiest rank over the mean; 1 without loads."""
    load_W = load_E @ np.array(ExpertPlacement(len(holders), ranks.size, holders).shares(ranks.nodes))
    return float(load_W.max() / load_W.mean()) if load_E.any() else 1.0


def _copies(holders: Holders) -> int:
    """Copies of experts besides one each."""
    return sum(map(len, holders)) - len(holders)


def _levels(world_size: int) -> tuple[Level, ...]:
    levels: list[Level] = [(tuple(range(world_size)),)]
    while len(levels[-1]) < world_size:
        halves: list[ReplicaSet] = []
        for block in levels[-1]:
            middle = -(-len(block) // 2)
            halves += [half for half in (block[:middle], block[middle:]) if half]
        levels.append(tuple(halves))
    return tuple(reversed(levels))


def _raised(load_E: NDArray[np.float64], level_E: NDArray[np.int64], ranks: Ranks) -> NDArray[np.int64] | None:
    """The levels with that of the expert with the highest load per copy one higher; None if it has a copy per rank."""
    copies_E = np.array([len(ranks.levels[level][0]) for level in level_E])
    hottest = int((load_E / copies_E).argmax())
    if level_E[hottest] + 1 == len(ranks.levels):
        return None
    raised_E = level_E.copy()
    raised_E[hottest] += 1
    return raised_E


class _Packing:
    """Experts of one layer on ranks, while they are placed."""

    def __init__(self, load_E: NDArray[np.float64], ranks: Ranks) -> None:
        self._load_E, self._ranks = load_E, ranks
        self._block_of: list[ReplicaSet] = [()] * len(load_E)
        self._load_W = np.zeros(ranks.size)
        self._free_W = np.full(ranks.size, ranks.room)
        self._mean = float(load_E.sum()) / ranks.size

    @property
    def holders(self) -> Holders:
        return tuple(self._block_of)

    @property
    def peak(self) -> float:
        return float(self._load_W.max()) / self._mean

    def fill(self, level_E: NDArray[np.int64], start: Holders) -> bool:
        """Place all experts on blocks of these levels: where they are in `start` if that is one, else those with the
        largest blocks and loads first, each where the busiest rank has least. False if there is no room."""
        order = sorted(range(len(level_E)), key=lambda e: (-level_E[e], -self._load_E[e]))
        for expert in order:
            here = start[expert] if start else ()
            if here in self._ranks.levels[level_E[expert]] and self._has_room(here):
                self._put(expert, here)
        for expert in order:
            if self._block_of[expert]:
                continue
            with_room = [block for block in self._ranks.levels[level_E[expert]] if self._has_room(block)]
            if not with_room:
                return False
            self._put(expert, min(with_room, key=lambda block: float(self._load_W[list(block)].max())))
        return True

    def exchange(self) -> None:
        """Move experts with one holder from the busiest rank to others, or exchange them for colder ones, as long as
        that lowers the higher of both ranks' loads."""
        while self.peak > EVEN:
            hot = int(self._load_W.argmax())
            mine = [expert for expert, block in enumerate(self._block_of) if block == (hot,)]
            theirs = [(e, block[0]) for e, block in enumerate(self._block_of) if len(block) == 1 and block[0] != hot]
            theirs += [(-1, rank) for rank in range(self._ranks.size) if rank != hot and self._free_W[rank]]
            if not mine or not theirs:
                return
            their_load_X = np.array([0.0 if expert < 0 else self._load_E[expert] for expert, _ in theirs])
            their_rank_X = np.array([rank for _, rank in theirs])
            less_MX = self._load_E[mine][:, None] - their_load_X[None]
            after_MX = np.maximum(self._load_W[hot] - less_MX, self._load_W[their_rank_X][None] + less_MX)
            after_MX[less_MX <= 0] = np.inf
            best = int(after_MX.argmin())
            if after_MX.flat[best] >= self._load_W[hot] * (1 - 1e-9):
                return
            given, (taken, rank) = mine[best // len(theirs)], theirs[best % len(theirs)]
            self._take(given)
            if taken >= 0:
                self._take(taken)
                self._put(taken, (hot,))
            self._put(given, (rank,))

    def _has_room(self, block: ReplicaSet) -> bool:
        return bool((self._free_W[list(block)] > 0).all())

    def _put(self, expert: int, block: ReplicaSet) -> None:
        self._block_of[expert] = block
        self._load_W += self._load_E[expert] * self._ranks.share_of[block]
        self._free_W[list(block)] -= 1

    def _take(self, expert: int) -> None:
        block = self._block_of[expert]
        self._load_W -= self._load_E[expert] * self._ranks.share_of[block]
        self._free_W[list(block)] += 1
