"""Digests of named tensors, independent of how a tensor is split: equal before and after a transfer, or a bit changed.

A tensor is read as 64-bit words, from its first element on. The digest of words w_j is sum_j w_j * r_j modulo 2^64, a
multilinear hash (Carter and Wegman, 1979) with odd pseudo-random r_j. Digests of disjoint ranges add up to that of the
tensor, also where a word is split, so each rank hashes what it holds and needs nothing else. It doesn't depend on the
transfer plan, so that a wrong plan can't hide. A changed element always changes it, since r_j is odd. It guards against
mistakes and bad memory, not against an attacker; tests compare sha256 as well. About 0.3 ns per fp32 element and core.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.state.ranges import NamedRanges

WORD = 8  # bytes
PERIOD = 1 << 15  # words of one table, which stays in the L2 cache
_TABLE = np.random.Generator(np.random.Philox(key=20)).integers(0, 2**64, PERIOD, dtype=np.uint64) | np.uint64(1)
_MASK = (1 << 64) - 1


def digest(start: int, data: Tensor) -> int:
    """The digest of a flat tensor as elements [start, start + numel) of a whole, in [0, 2^64)."""
    raw = data.detach().cpu().contiguous().view(torch.uint8).numpy()
    begin = start * data.element_size()  # bytes from the whole's beginning
    lead = min(-begin % WORD, len(raw))
    body = (len(raw) - lead) // WORD * WORD
    first = (begin + lead) // WORD
    total = _of_words(first, raw[lead : lead + body].view(np.uint64))
    total += _of_words(begin // WORD, _padded(raw[:lead], begin % WORD)) if lead else 0
    total += _of_words(first + body // WORD, _padded(raw[lead + body :], 0))
    return total & _MASK


def _padded(part: NDArray[np.uint8], at: int) -> NDArray[np.uint64]:
    """A word with only these bytes set, from the byte `at` on."""
    word = np.zeros(WORD, dtype=np.uint8)
    word[at : at + len(part)] = part
    return word.view(np.uint64)


def _of_words(first: int, words: NDArray[np.uint64]) -> int:
    """The digest of words that begin with the whole's word `first`."""
    total, position, end = 0, first, first + len(words)
    while position < end:
        block, offset = divmod(position, PERIOD)
        count = min(PERIOD - offset, end - position)
        here = position - first
        total += int(np.dot(words[here : here + count], _TABLE[offset : offset + count])) * _block_key(block)
        position += count
    return total


def _block_key(block: int) -> int:
    """An odd 64-bit key per block (splitmix64)."""
    z = (block * 0x9E3779B97F4A7C15 + 0x1234567) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1


class StateDigests:
    """Digests of one worker's parts of all named tensors.

    Args:
        names: tensors in an order that all workers share; others are left out.
        replicated: names of those that each holder has in full; the holders' digests of the others add up.
        ranges: what this worker holds; None if it is no member.
    """

    def __init__(self, names: Sequence[str], replicated: frozenset[str], ranges: NamedRanges | None) -> None:
        index = {name: i for i, name in enumerate(names)}
        low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
        self.sums = np.zeros(len(names), dtype=np.int64)
        self.lowest = np.full(len(names), high, dtype=np.int64)
        self.highest = np.full(len(names), low, dtype=np.int64)
        for name, held in ranges if ranges is not None else ():
            if name not in index:
                continue
            value = digest(held.start, held.data)
            signed = value - (1 << 64) if value >> 63 else value
            i = index[name]
            if name in replicated:
                self.lowest[i] = self.highest[i] = signed
            else:
                self.sums[i] = np.int64((int(self.sums[i]) + value + (1 << 63)) % (1 << 64) - (1 << 63))


def differing(names: Sequence[str], before: StateDigests, after: StateDigests, peers: PeerGroup) -> list[str]:
    """Tensors whose digest differs between two states, or between two holders of the same tensor. Collective.

    Returns:
        names, in order; empty when every element of every tensor is equal and every replica agrees.
    """
    sums = torch.from_numpy(np.stack([before.sums, after.sums]))
    lowest = torch.from_numpy(np.stack([before.lowest, after.lowest]))
    highest = torch.from_numpy(np.stack([before.highest, after.highest]))
    peers.reduce(sums, dist.ReduceOp.SUM)
    peers.reduce(lowest, dist.ReduceOp.MIN)
    peers.reduce(highest, dist.ReduceOp.MAX)
    equal = (sums[0] == sums[1]) & (lowest[0] == lowest[1]) & (highest[0] == highest[1])
    held = lowest[0] != np.iinfo(np.int64).max
    agreed = ~held | (lowest[0] == highest[0])
    return [names[int(i)] for i in torch.nonzero(~(equal & agreed))]


class PartSums:
    """Sums of ranks' parts of partial tensors, as far as one worker holds them: a sum of their elements with
    pseudo-random signs, which adds up over the ranks as they do.

    Sums in fp32 are rounded, so no digest of bits could show whether one was kept.

    Args:
        names: of the partial tensors, in an order that all workers share; each is whole on every rank.
        ranges: what this worker holds; None if it is no member.
    """

    def __init__(self, names: Sequence[str], ranges: NamedRanges | None) -> None:
        self.signed, self.squares = (torch.zeros(len(names), dtype=torch.float64) for _ in range(2))
        for i, name in enumerate(names if ranges is not None else ()):
            for start, stop in ranges.spans(name) if ranges is not None else ():
                part = ranges.view(name, start, stop).detach().cpu()  # type: ignore[union-attr]
                signs = torch.from_numpy(_SIGNS).repeat(-(-len(part) // PERIOD))[: len(part)]
                self.signed[i] += torch.dot(part.double(), signs)
                self.squares[i] += torch.linalg.vector_norm(part, dtype=torch.float64).square()


_SIGNS = np.where(_TABLE >> np.uint64(63), 1.0, -1.0)


def change(before: PartSums, after: PartSums, peers: PeerGroup) -> float:
    """Change of the sums relative to the norm of all parts together, of the tensor where it is largest. Collective."""
    signed, squares = torch.stack([before.signed, after.signed]), before.squares.clone()
    peers.reduce(signed, dist.ReduceOp.SUM)
    peers.reduce(squares, dist.ReduceOp.SUM)
    moved = (signed[0] - signed[1]).abs()
    return float((moved / squares.sqrt().clamp(min=torch.finfo(torch.float64).tiny)).max()) if len(moved) else 0.0
