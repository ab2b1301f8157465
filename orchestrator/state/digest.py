"""Digests of named tensors, independent of how a tensor is split: equal before and after a transfer, or a bit changed.

A tensor is read as 64-bit words, from its first element on. The digest of words w_j is sum_j w_j * r_j modulo 2^64, a
multilinear hash (Carter and Wegman, 1979) with odd pseudo-random r_j. Digests of disjoint ranges add up to that of the
tensor, also where a word is split, so each rank hashes what it holds and needs nothing else. It doesn't depend on the
transfer plan, so that a wrong plan can't hide. A changed element always changes it, since r_j is odd. It guards against
mistakes and bad memory, not against an attacker; tests compare sha256 as well. About 0.3 ns per fp32 element and core.
Tensors of a GPU are hashed there, and only the digests are copied to the host.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.state.ranges import NamedRanges

WORD = 8  # bytes
PERIOD = 1 << 15  # words of one table, which stays in the L2 cache
BLOCKS_AT_ONCE = 1 << 9  # on a GPU: 128 MB, of which copies are made
_TABLE = np.random.Generator(np.random.Philox(key=20)).integers(0, 2**64, PERIOD, dtype=np.uint64) | np.uint64(1)
_MASK = (1 << 64) - 1


def digest(start: int, data: Tensor) -> int:
    """The digest of a flat tensor as elements [start, start + numel) of a whole, in [0, 2^64)."""
    return digests([(start, data)])[0]


def digests(parts: Iterable[tuple[int, Tensor]]) -> list[int]:
    """The digest of each (start, data), as `digest` has it. The host waits for a GPU once for all of them."""
    found: list[int] = []
    on_device: list[tuple[int, Tensor]] = []
    for start, data in parts:
        if data.is_cpu:
            found.append(_on_host(start, data))
        else:
            on_device.append((len(found), digest_on_device(start, data)))
            found.append(0)
    if on_device:
        for (place, _), value in zip(on_device, torch.stack([value for _, value in on_device]).tolist(), strict=True):
            found[place] = value & _MASK
    return found


def digest_on_device(start: int, data: Tensor) -> Tensor:
    """The digest of a flat tensor, computed where it lies: a scalar int64, to be read modulo 2^64. int64 products and
    sums wrap there too."""
    raw = data.detach().contiguous().view(torch.uint8)
    begin = start * data.element_size()  # bytes from the whole's beginning
    table = _table_on(raw.device)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    portion = BLOCKS_AT_ONCE * PERIOD * WORD
    for low in range(begin // portion * portion, begin + len(raw), portion):
        first, last = max(begin, low), min(begin + len(raw), low + portion)
        block, end = first // (PERIOD * WORD), -(-last // (PERIOD * WORD))
        padded = torch.zeros((end - block) * PERIOD * WORD, dtype=torch.uint8, device=raw.device)
        place = first - block * PERIOD * WORD
        padded[place : place + last - first] = raw[first - begin : last - begin]
        words = padded.view(torch.int64).view(end - block, PERIOD)
        total += ((words * table).sum(1) * _keys_on(raw.device, end)[block:end]).sum()
    return total


@cache
def _table_on(device: torch.device) -> Tensor:
    return torch.from_numpy(_TABLE.view(np.int64)).to(device)


def _keys_on(device: torch.device, count: int) -> Tensor:
    """The keys of at least `count` blocks, from the first one on."""
    return _many_keys_on(device, 1 << (count - 1).bit_length())


@cache
def _many_keys_on(device: torch.device, count: int) -> Tensor:
    return torch.tensor([_signed(_block_key(number)) for number in range(count)]).to(device)


def _signed(value: int) -> int:
    """A number in [0, 2^64) as the int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def _on_host(start: int, data: Tensor) -> int:
    raw = data.detach().contiguous().view(torch.uint8).numpy()
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
        mine = [(name, held) for name, held in ranges if name in index] if ranges is not None else []
        for (name, _), value in zip(mine, digests((held.start, held.data) for _, held in mine), strict=True):
            i = index[name]
            if name in replicated:
                self.lowest[i] = self.highest[i] = _signed(value)
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
        index = {name: i for i, name in enumerate(names)}
        for name, held in ranges if ranges is not None else ():
            if name in index:
                signs = _signs_on(held.data.device).repeat(-(-len(held.data) // PERIOD))[: len(held.data)]
                self.signed[index[name]] += torch.dot(held.data.detach().double(), signs).cpu()
                self.squares[index[name]] += torch.linalg.vector_norm(held.data, dtype=torch.float64).square().cpu()


@cache
def _signs_on(device: torch.device) -> Tensor:
    return torch.from_numpy(np.where(_TABLE >> np.uint64(63), 1.0, -1.0)).to(device)


def change(before: PartSums, after: PartSums, peers: PeerGroup) -> float:
    """Change of the sums relative to the norm of all parts together, of the tensor where it is largest. Collective."""
    signed, squares = torch.stack([before.signed, after.signed]), before.squares.clone()
    peers.reduce(signed, dist.ReduceOp.SUM)
    peers.reduce(squares, dist.ReduceOp.SUM)
    moved = (signed[0] - signed[1]).abs()
    return float((moved / squares.sqrt().clamp(min=torch.finfo(torch.float64).tiny)).max()) if len(moved) else 0.0
