"""Fingerprint of the state of each rank of a world after every step: what a replay of the step is compared with.

A rank accounts for what it updates: its ranges of the weights, fp32 where there are masters, and of what is sharded
like them. A number is a sum of digests modulo 2^64, each times an odd key of its tensor's name, so it adds up over
parts. Ranks of any other world can compute it together, each from the parts it holds, and the sum over all ranks
depends on no world.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.elastic.state_layout import StateLayout
from orchestrator.state.digest import digests
from orchestrator.state.ranges import NamedRanges, Range

MODULUS = 1 << 64


class StateFingerprint:
    """One rank's part of the fingerprints of a world's ranks: of its own world, or of one whose steps it replays.

    Args:
        ranges: held by this rank, read at every call.
        layout: of the world whose ranks are asked for.
    """

    def __init__(self, ranges: NamedRanges, layout: StateLayout) -> None:
        self._parts = [(rank, key_of(name), part) for rank, name, part in _parts(ranges, layout)]
        self._world_size = layout.world.size

    def look(self) -> NDArray[np.uint64]:
        """[ranks of the layout's world], this rank's part of each sum modulo 2^64. About 0.3 ns per element."""
        sums = [0] * self._world_size
        found = digests((part.start, part.data) for *_, part in self._parts)
        for (rank, key, _), value in zip(self._parts, found, strict=True):
            sums[rank] += key * value
        return np.array([total % MODULUS for total in sums], dtype=np.uint64)


def _parts(ranges: NamedRanges, layout: StateLayout) -> Iterator[tuple[int, str, Range]]:
    """(accountable rank, tensor, elements) of all that this rank updates, split as in the layout."""
    names: dict[str, list[str]] = {}
    for name, tensor in layout.tensors.items():
        if tensor.like is not None and not tensor.is_copy:
            names.setdefault(tensor.like.name, []).append(name)
    shard_tensor, starts, stops, ranks = layout.shards.T
    for parameter, cut in layout.cuts.items():
        low, high = np.searchsorted(shard_tensor, [cut, cut + 1])
        for mine in ranges.spans(layout.names[cut]):
            for start, stop, rank in zip(starts[low:high], stops[low:high], ranks[low:high], strict=True):
                begin, end = max(int(start), mine[0]), min(int(stop), mine[1])
                updated = layout.tensors[layout.names[cut]].of_param(begin, end)
                for name in names[parameter] if begin < end else ():
                    span = layout.tensors[name].cut(*updated)
                    yield int(rank), name, Range(*span, ranges.view(name, *span))


class MemoryGuard:
    """Detects writes to ranges during a time in which none should happen.

    Args:
        ranges: held by this rank, read at every call.
    """

    def __init__(self, ranges: NamedRanges) -> None:
        self._ranges = ranges
        self._digests: list[int] = []

    def close(self) -> None:
        """Begin the time without writes."""
        self._digests = self._look()

    def open(self) -> list[str]:
        """End the time without writes. Returns the tensors that were written since `close`."""
        if not self._digests:
            return []
        pairs = zip(self._ranges, self._digests, self._look(), strict=True)
        changed = [name for (name, _), before, now in pairs if before != now]
        self._digests = []
        return list(dict.fromkeys(changed))

    def _look(self) -> list[int]:
        return digests((held.start, held.data) for _, held in self._ranges)


def key_of(name: str) -> int:
    """An odd 64-bit key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1


def whole(digests: Sequence[str]) -> str:
    """The digest of the whole state, in 16 hexadecimal digits: the same in any world.

    Args:
        digests: of all ranks, as in `StepRecord.digests`.
    """
    return f"{sum(int(digits, 16) for digits in digests) % MODULUS:016x}"
