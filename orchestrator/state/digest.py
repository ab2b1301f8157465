"""Digests of named tensors that don't depend on how a tensor is cut: equal before and after a transfer, or a bit moved.

The digest of elements x_i (their bits, as unsigned integers) is sum_i x_i * r_i modulo 2^64, a multilinear hash (Carter
and Wegman, 1979) with odd pseudo-random r_i. Digests of disjoint ranges add up to the tensor's, so each rank hashes
what it holds, whoever holds the rest. It is chosen apart from the transfer plan, so that a wrong plan can't hide.
A changed element always changes it, since r_i is odd. It guards against mistakes and bad memory, not against an enemy;
tests compare sha256 as well. About 1 ns per element and core.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.comm.peers import PeerGroup
from orchestrator.state.ranges import NamedRanges

PERIOD = 1 << 15  # elements of one table; its products stay in the L2 cache
_TABLE = np.random.Generator(np.random.Philox(key=20)).integers(0, 2**64, PERIOD, dtype=np.uint64) | np.uint64(1)
_MASK = (1 << 64) - 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(start: int, data: Tensor) -> int:
    """The digest of a flat tensor as elements [start, start + numel) of a whole, in [0, 2^64)."""
    bits = _bits(data)
    total = 0
    position, end = start, start + len(bits)
    scratch = np.empty(PERIOD, dtype=np.uint64)
    while position < end:
        block, offset = divmod(position, PERIOD)
        count = min(PERIOD - offset, end - position)
        part = scratch[:count]
        here = position - start
        np.multiply(bits[here : here + count], _TABLE[offset : offset + count], out=part, casting="unsafe")
        total += int(part.sum(dtype=np.uint64)) * _block_key(block)
        position += count
    return total & _MASK


def _bits(data: Tensor) -> NDArray[np.unsignedinteger[np.typing.NBitBase]]:
    array = data.detach().cpu().contiguous().view(_BITS[data.element_size()]).numpy()
    return array.view(f"u{data.element_size()}")


def _block_key(block: int) -> int:
    """An odd 64-bit key per block (splitmix64)."""
    z = (block * 0x9E3779B97F4A7C15 + 0x1234567) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1


class StateDigests:
    """Digests of all named tensors, as far as one worker holds them.

    Args:
        names: every tensor of the run in an order that all workers share.
        replicated: those of which each holder has all, by name; of the others the holders' digests add up.
        ranges: what this worker holds; None if it is no member.
    """

    def __init__(self, names: Sequence[str], replicated: frozenset[str], ranges: NamedRanges | None) -> None:
        index = {name: i for i, name in enumerate(names)}
        low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
        self.sums = np.zeros(len(names), dtype=np.int64)
        self.lowest = np.full(len(names), high, dtype=np.int64)
        self.highest = np.full(len(names), low, dtype=np.int64)
        for name, held in ranges if ranges is not None else ():
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
