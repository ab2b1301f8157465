"""Traffic counters: bytes that this process has sent to other workers, by kind.

Recorded where a collective or a stream is called, by its algorithm's cost: an all-to-all and a stream send each byte
once; gloo's ring sends (W - 1) / W of a gathered tensor from each of W ranks, and twice that of a reduced one. Headers
of TCP and IP aren't counted, nor is traffic through Ray or the rendezvous store.
"""

import threading

from torch import Tensor

from orchestrator.protocol.usage import Traffic, TrafficKind

_lock = threading.Lock()
_totals = dict.fromkeys(TrafficKind, Traffic())


def enter(kind: TrafficKind, payload: int, index: int = 0, raw: int | None = None, across: int = 0) -> None:
    """Record bytes that leave this process for other workers, `across` of them to other nodes. From any thread."""
    traffic = Traffic(payload + index if raw is None else raw, payload, index, across)
    with _lock:
        _totals[kind] += traffic


def enter_gathered(kind: TrafficKind, gathered: Tensor, num_ranks: int) -> None:
    """Record an all-gather: every rank contributed an equal part of the tensor and now has all of it."""
    enter(kind, gathered.nbytes * (num_ranks - 1) // num_ranks)


def enter_reduced(kind: TrafficKind, reduced: Tensor, num_ranks: int) -> None:
    """Record an all-reduce: the tensor was summed over the ranks, each of which now has the sum."""
    enter(kind, 2 * reduced.nbytes * (num_ranks - 1) // num_ranks)


def totals() -> dict[TrafficKind, Traffic]:
    """Counts since the start of the process."""
    with _lock:
        return dict(_totals)


class Since:
    """Traffic between two readings."""

    def __init__(self) -> None:
        self._before = totals()

    def look(self) -> dict[TrafficKind, Traffic]:
        """Traffic of all kinds since the last reading, or since construction."""
        now, before = totals(), self._before
        self._before = now
        return {kind: now[kind] - before[kind] for kind in TrafficKind}
